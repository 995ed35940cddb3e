"""What keeps a data directory in order: collection by age, verification, backups, how much of the disk it takes."""
