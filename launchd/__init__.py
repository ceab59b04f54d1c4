"""Handing the daemon, and a gateway if it is wished, to the system's service manager: launchd, or systemd on Linux.

    agent       what is to be kept alive: one description for both managers
    launchd     the description as a property list, and launchctl's words
    systemd     the description as a user unit, and systemctl's words
    steps       what an installation is made of: files to write, commands to run, things to wait for
    plans       which steps lead from what is found to what is wished (pure)
    installer   finds what is there, and carries a plan out

Until a service is installed daemons start on demand (``expertd.protocol.rendezvous``).
"""
