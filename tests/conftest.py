import signal

# Under nohup SIGHUP is ignored, and so it would be by the processes that the tests start and then send it.
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
