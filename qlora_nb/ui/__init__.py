"""What is seen: figures, widgets and exercise checkers. Nothing else in the package imports this
room.
"""
