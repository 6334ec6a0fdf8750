"""A machine's process is passed on as it is, but for JAX's report of a lost peer, which becomes a sentence."""

import signal
import subprocess
import sys

import pytest

from launch.watch import Report

WATCH = (sys.executable, "-m", "launch.watch", "--")
ENDS = "F1122 01:41:40.312955   24713 client.h:80] Terminating process because the JAX distributed service detected "
ENDS += "fatal errors. This most likely indicates that another task died. absl::Status: "
SILENT = "UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):\n"
# As they were printed by jax 0.10.
REPORTS = {
    "sent no heartbeats any more": (
        f"E1122 01:41:20.091240   24456 coordination_service.cc:1549] [15993] Use error polling to propagate: {SILENT}"
        f"1\n12\nThe tasks have crashed. Check the task logs.\n{ENDS}{SILENT}1\n12\nThe tasks have crashed.\n"
        "*** Check failure stack trace: ***\n    @     0x7f827a440634  absl::lts_20260107::SendToLog()\n"
    ),
    "leader's socket closed": (
        "W1122 01:41:40.312836   24713 preemption_sync_manager.cc:147] Failed to retrieve: UNAVAILABLE: Socket closed\n"
        f"{ENDS}UNAVAILABLE: Failed to send RPC to coordination service.\n"
    ),
    "leader is silent": f"{ENDS}DEADLINE_EXCEEDED: Deadline Exceeded\n\nRPC: /xla.coordination/Heartbeat\n",
}


@pytest.mark.parametrize(
    ("report", "lost"),
    [
        ("sent no heartbeats any more", "processes 1, 12 sent no heartbeats any more"),
        ("leader's socket closed", "process 0, through which the others find each other, does not answer"),
        ("leader is silent", "process 0, through which the others find each other, does not answer"),
    ],
)
def test_jax_s_report_is_told_as_a_sentence(report, lost, capsys):
    told = Report()
    told.take("a word before\n")
    for line in REPORTS[report].splitlines(keepends=True):
        told.take(line)
    assert told.lost() == lost
    assert capsys.readouterr().err == "a word before\n"


def test_what_began_as_a_report_and_is_none_is_passed_on(capsys):
    told = Report()
    lines = ["W1122 01:41:40.3   24713 preemption_sync_manager.cc:147] a notice\n", "and what follows it\n"]
    for line in lines:
        told.take(line)
    told.tell_old()
    assert told.lost() is None
    assert capsys.readouterr().err == ""
    told.tell()
    assert capsys.readouterr().err == "".join(lines)


def test_output_status_and_signals_are_passed_on():
    program = (
        "import signal, sys, time; print('out', flush=True); print('E1122 1 coordination_service.cc:1] e\\nerr', "
        "file=sys.stderr)\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\nprint('ready', flush=True)\n"
        "while True: time.sleep(0.1)"
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([*WATCH, "python", "-c", program], **pipes) as watch:
        assert [watch.stdout.readline() for _ in range(2)] == ["out\n", "ready\n"]
        watch.send_signal(signal.SIGTERM)
        _, errors = watch.communicate()
    assert (watch.returncode, errors) == (75, "E1122 1 coordination_service.cc:1] e\nerr\n")
    done = subprocess.run([*WATCH, "sh", "-c", "kill -9 $$"], check=False)
    assert done.returncode == 128 + signal.SIGKILL


def test_a_program_that_is_not_there_is_a_sentence():
    done = subprocess.run([*WATCH, "pyhton"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (
        2,
        "error: there is no program 'pyhton'; write the command as in a shell, as python -m MODULE\n",
    )
