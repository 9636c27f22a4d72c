"""What a run leaves behind: its folder, sealed files, progress and no secrets."""
