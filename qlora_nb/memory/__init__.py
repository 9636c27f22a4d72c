"""Memory: bytes that stay, bytes that move, the peak before anything is loaded, and refusals before
a download.
"""
