"""Where workers live: this process or Ray actors."""
