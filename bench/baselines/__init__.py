"""What hia is compared with."""
