"""What `perp plan` says of a job against what the job takes."""
