"""The parts of the model, one file each, and the whole: idefics2.py."""
