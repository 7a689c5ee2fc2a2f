"""What `taut tune` does: the tiles of a GPU for the shapes of given models, measured.

problems   what a model's layers ask a tile table for, and the shapes at which that is measured   (plain Python)
space      the tiles that can be chosen                                                            (plain Python)
search     the choice among them, from what a timer says                                           (plain Python)
writing    the table that comes of it                                                              (plain Python)
measure    the timer: compiled in processes of its own, checked, timed on the GPU
"""
