"""What every use of a shared layer read and what flowed back to it, turned into step features."""
