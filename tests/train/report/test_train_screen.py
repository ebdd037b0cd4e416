"""What the screen of a program shows of errors that nobody is left to hear."""

import subprocess
import sys

import programs

# Writes of TensorStore that fail once the event loop that waits for them is closed, and tasks whose error nobody asks
# for: both as Orbax leaves them behind when another of its writes has failed.
PROGRAM = """
import asyncio, gc, sys, threading
import tensorstore
from train import screen

async def begin(future):
    async def wait():
        await future
    begun.append(asyncio.ensure_future(wait()))
    await asyncio.sleep(0)

def fail_late(error):
    promise, future = tensorstore.Promise.new()
    loop = asyncio.new_event_loop()
    loop.run_until_complete(begin(future))
    loop.close()
    thread = threading.Thread(target=promise.set_exception, args=[error])
    thread.start()
    thread.join()

def forget_a_task(path):
    names = {}
    exec(compile(f"async def write(): raise ValueError('in {path}')", path, "exec"), names)
    async def forget():
        asyncio.ensure_future(names["write"]())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    asyncio.run(forget())
    gc.collect()

class Unhappy:
    def __del__(self):
        raise RuntimeError("Event loop is closed")

begun = []
if "plain" not in sys.argv:
    screen.console()
fail_late(ValueError("No space left on device"))
forget_a_task("orbax/checkpoint/serialization.py")
forget_a_task("somewhere/else.py")
Unhappy()
"""


def said(*arguments: str) -> str:
    command = [sys.executable, "-c", PROGRAM, *arguments]
    ended = subprocess.run(command, cwd=programs.ROOT, capture_output=True, text=True, check=True)
    return ended.stdout + ended.stderr


def test_writes_that_orbax_gave_up_fail_in_silence_and_nothing_else_does():
    output = said()
    assert "in orbax" not in output
    assert "call_soon_threadsafe" not in output
    assert "in somewhere/else.py" in output
    assert "Unhappy.__del__" in output


def test_without_the_screen_they_are_heard():
    output = said("plain")
    assert "in orbax" in output
    assert "call_soon_threadsafe" in output
