"""Parameter transforms: trees in, trees out. They work on arrays and on ShapeDtypeStructs alike."""
