"""What talks to daemon and workers on a user's behalf: the command line and the HTTP gateway.  Imports no mlx."""
