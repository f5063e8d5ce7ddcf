"""The result cache: what a load quantized is kept, and the next load of the same maps it instead.

``stamps`` tells whether a file is still the one it was, ``store`` keeps entries on disk, ``key`` says which load an
entry answers, ``results`` puts the three into a load. None but ``key`` and ``results`` imports torch.
"""
