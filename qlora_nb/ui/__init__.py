"""What a reader sees: the look of all figures, figures that notebooks share, widgets, panels and
checkers of exercises; and how JupyterLab is opened (`lab`). Only `lessons`, the notebooks and, for
`lab`, the command line import this room.
"""
