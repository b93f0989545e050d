"""Which option every layer uses, under every device's memory."""
