"""Runs a model's Python program in a process of its own, under limits (Linux).

This stops accidents (endless loops, memory, forks, floods of output, a look at the network), not
attackers: the program keeps the rights of this user, who may read and write its files. Against
attackers put a container behind `Sandbox`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import pathlib
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from typing import Literal, Protocol

_CHUNK = 1 << 16
_POLL_S = 0.01  # between two looks at a program that neither writes nor ends

# The limits are set by the child itself, before it compiles the program: a `preexec_fn` would run
# Python between fork and exec, which can deadlock in a process with threads, and JAX has many.
# RLIMIT_NPROC counts all processes and threads of the user, not of the program: any positive value
# is either too small on a busy machine or no limit, while 0 refuses every fork, whatever else runs.
# The kernel exempts root, so Python's own ways to start them are refused too, for every user alike.
_PRELUDE = """
def _start(cpu_s, memory_bytes, file_bytes, processes):
  import _posixsubprocess, _thread, resource, sys
  sys.argv = ['program.py']
  limits = {'CORE': 0, 'CPU': cpu_s, 'AS': memory_bytes, 'FSIZE': file_bytes}
  refused = {'socket.' + call for call in ('bind', 'connect', 'sendto', 'sendmsg', 'getaddrinfo',
                                           'gethostbyname', 'gethostbyaddr', 'getnameinfo')}
  def refuse(*args, **kwargs):
    raise PermissionError('processes and threads are not allowed in the sandbox')
  if not processes:
    limits['NPROC'] = 0
    refused |= {'os.' + call for call in ('fork', 'forkpty', 'posix_spawn', 'system', 'exec')}
    _posixsubprocess.fork_exec = _thread.start_new_thread = refuse  # these two have no event
    _thread.start_joinable_thread = refuse
  def audit(event, args):
    if event in refused:
      raise PermissionError(f'{event} is not allowed in the sandbox')
  def show(kind, error, trace):
    while trace and trace.tb_frame.f_code.co_filename != 'program.py':
      trace = trace.tb_next
    sys.__excepthook__(kind, error.with_traceback(trace), trace)
  for name, value in limits.items():
    kind = getattr(resource, 'RLIMIT_' + name)
    hard = resource.getrlimit(kind)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, hard if name == 'CPU' else value))
  sys.excepthook = show
  sys.addaudithook(audit)
  with open('program.py', 'rb') as file:
    source = file.read()
  names = globals()
  del names['_start']
  names['__file__'] = 'program.py'
  exec(compile(source, 'program.py', 'exec', dont_inherit=True), names)
"""

Status = Literal['ok', 'error', 'timeout', 'killed']


@dataclasses.dataclass(frozen=True)
class Limits:
  """What a program may use; `memory_bytes` of address space, `file_bytes` per file it writes.

  `processes` lets it start processes and threads, without a bound on their number.
  """

  wall_s: float = 5.0
  cpu_s: float = 5.0
  memory_bytes: int = 1 << 30
  file_bytes: int = 1 << 20
  output_bytes: int = 16384  # of each stream, the rest is dropped
  processes: bool = False

  def __post_init__(self):
    for name in ('wall_s', 'cpu_s', 'memory_bytes', 'output_bytes'):
      if not getattr(self, name) > 0:
        raise ValueError(f'{name} must be positive, got {getattr(self, name)}')
    if not math.isfinite(self.cpu_s):
      raise ValueError(f'cpu_s must be finite, got {self.cpu_s}')
    if self.file_bytes < 0:
      raise ValueError(f'file_bytes must be at least 0, got {self.file_bytes}')


@dataclasses.dataclass(frozen=True)
class Result:
  """What a program wrote and how it ended; a negative `returncode` is the signal that ended it.

  'timeout' is the wall or the CPU limit, 'killed' any other signal, 'error' an exit status above 0.
  """

  stdout: str
  stderr: str
  status: Status
  returncode: int


class Sandbox(Protocol):
  """Runs a program to its end; whatever the program does is in the result, never an exception."""

  def __call__(self, code: str, *, stdin: str = '', limits: Limits = ...) -> Result: ...


def run_python(code: str, *, stdin: str = '', limits: Limits = Limits()) -> Result:  # noqa: B008
  """Runs `code` with the standard library only, in an empty folder that goes with it.

  Stops accidents, not attackers. Errors: OSError if no process or folder can be had.
  """
  folder = tempfile.mkdtemp(prefix='zppo_jax_sandbox_')
  try:
    pathlib.Path(folder, 'program.py').write_bytes(code.encode('utf-8', 'surrogatepass'))
    with tempfile.TemporaryFile() as source:
      source.write(stdin.encode('utf-8', 'surrogatepass'))
      source.seek(0)
      with _start(folder, source, limits) as process:
        outputs, late = _supervise(process, limits)
  finally:
    _remove(folder)
  stdout, stderr = (cut(output, limits.output_bytes) for output in outputs)
  return Result(stdout, stderr, _status(process.returncode, late), process.returncode)


def cut(data: bytes, max_bytes: int) -> str:
  """`data` as text; behind a cut, between two characters, stands a marker within `max_bytes`.

  What is not UTF-8 becomes U+FFFD. The marker is kept whole where `max_bytes` has no room for it.
  """
  if len(data) <= max_bytes:
    return data.decode('utf-8', 'replace')
  marker = f'\n[cut at {max_bytes} bytes]'
  end = max(0, max_bytes - len(marker))
  for _ in range(3):  # a character has up to three continuation bytes
    end -= end > 0 and data[end] & 0xC0 == 0x80
  return data[:end].decode('utf-8', 'replace') + marker


def _start(folder: str, stdin, limits: Limits) -> subprocess.Popen:
  values = (math.ceil(limits.cpu_s), limits.memory_bytes, limits.file_bytes, limits.processes)
  # The flags are those of -I but for -E: with the hash seed fixed, a program that prints a set
  # prints the same on every replay.
  return subprocess.Popen(
    [sys.executable, '-P', '-s', '-S', '-X', 'utf8', '-c', f'{_PRELUDE}_start{values}'],
    stdin=stdin,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    bufsize=0,
    cwd=folder,
    env={'PYTHONHASHSEED': '0'},
    start_new_session=True,
  )


def _supervise(process: subprocess.Popen, limits: Limits) -> tuple[list[bytes], bool]:
  """Reads until the program ends or is late, then ends its process group; (outputs, late)."""
  end = time.monotonic() + limits.wall_s
  kept = {process.stdout: bytearray(), process.stderr: bytearray()}
  most = limits.output_bytes + 1  # one more byte tells that there was more
  late = True
  try:
    with selectors.DefaultSelector() as selector:
      for stream in kept:
        os.set_blocking(stream.fileno(), False)
        selector.register(stream, selectors.EVENT_READ)
      while (left := end - time.monotonic()) > 0:
        if _has_ended(process):
          late = False
          break
        for key, _ in selector.select(min(left, _POLL_S)):
          if not _read(key.fileobj, kept[key.fileobj], most):
            selector.unregister(key.fileobj)
  finally:  # before the leader is reaped, so that its group cannot be another one's
    with contextlib.suppress(ProcessLookupError):
      os.killpg(process.pid, signal.SIGKILL)
    process.wait()
  for stream, data in kept.items():
    while len(data) < most and _read(stream, data, most):
      pass
  return [bytes(data) for data in kept.values()], late


def _has_ended(process: subprocess.Popen) -> bool:
  """Whether the process is a zombie; it stays one."""
  return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _read(stream, data: bytearray, most: int) -> bool:
  """Appends what there is, up to `most` bytes in all; false if there is nothing (more)."""
  chunk = stream.read(_CHUNK)
  data += (chunk or b'')[: most - len(data)]
  return bool(chunk)


def _remove(folder: str) -> None:
  with contextlib.suppress(RecursionError):  # a program may nest folders as deep as it likes
    shutil.rmtree(folder, ignore_errors=True)
  if os.path.exists(folder):  # or take the rights to them away
    for command in (['chmod', '-R', 'u+rwx'], ['rm', '-rf']):
      subprocess.run([*command, folder], check=False, capture_output=True)


def _status(returncode: int, late: bool) -> Status:
  if late or returncode == -signal.SIGXCPU:
    return 'timeout'
  if returncode < 0:
    return 'killed'
  return 'error' if returncode else 'ok'
