"""An S3 server of moto's, in memory and in a process of its own: starts in 2 s, answers in 3 ms."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator

CODE = """
import sys
import threading
from moto.s3.responses import S3Response
from moto.server import ThreadedMotoServer

# Moto looks whether a key is there and then puts it: of two create-once writers, both may win.
lock = threading.Lock()

def one_at_a_time(method):
    def locked(*arguments, **named):
        with lock:
            return method(*arguments, **named)
    return locked

for name in ("put_object", "_key_response_post"):
    setattr(S3Response, name, one_at_a_time(getattr(S3Response, name)))

server = ThreadedMotoServer(sys.argv[1], 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""

ENVIRONMENT = {"AWS_ACCESS_KEY_ID": "anybody", "AWS_SECRET_ACCESS_KEY": "whatever", "AWS_REGION": "us-east-1"}
"""For its clients; it asks nobody who they are."""


@contextlib.contextmanager
def s3_server(host: str = "127.0.0.1") -> Iterator[str]:
    """Its URL. It ends with this process, however that ends."""
    command = [sys.executable, "-W", "ignore", "-c", CODE, host]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, text=True, **pipes) as server:
        yield f"http://{host}:{int(server.stdout.readline())}"
        server.kill()
