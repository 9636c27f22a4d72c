"""What a run leaves behind: its folder and record (`runs`), files that are whole (`files`) and
sealed (`seal`), a stop in good order (`interrupts`), and no secrets (`redaction`).
"""
