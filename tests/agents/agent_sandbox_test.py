"""Every limit of the sandbox bites, and nothing of a program stays behind."""

import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc

import pytest

from zppo_jax.agents import sandbox
from zppo_jax.agents.sandbox import Limits, Result, run_python


def timed(*args, **kwargs):
  start = time.monotonic()
  return run_python(*args, **kwargs), time.monotonic() - start


def test_a_program_reads_and_writes():
  code = 'import sys\nprint(input() + "ß")\nprint(sys.argv, __name__, file=sys.stderr)'
  result = run_python(code, stdin='grö\nrest')
  assert result == Result('größ\n', "['program.py'] __main__\n", 'ok', 0)


def test_a_failing_program_shows_its_own_lines_only():
  result = run_python('def f(x):\n  return 1 / x\nf(0)')
  assert (result.status, result.returncode) == ('error', 1)
  lines = result.stderr.splitlines()
  assert lines[:2] == ['Traceback (most recent call last):',
                       '  File "program.py", line 3, in <module>']
  assert lines[-1] == 'ZeroDivisionError: division by zero' and '<string>' not in result.stderr
  broken = run_python('x = (')
  assert broken.status == 'error' and broken.stderr.startswith('  File "program.py", line 1')
  assert run_python('import sys; sys.exit(7)').returncode == 7


@pytest.mark.parametrize('code', ['x = "\ud800"', 'x = 1\0', '\ufeffx = ', '(' * 10_000])
def test_text_that_is_no_program_is_an_error(code):
  result = run_python(code)
  assert result.status == 'error' and 'Error' in result.stderr


def test_a_program_sees_neither_our_environment_nor_our_packages(monkeypatch):
  monkeypatch.setenv('SOME_API_KEY', 'secret')
  code = ('import os, sys\nprint("SOME_API_KEY" in os.environ, os.listdir())\n'
          'print(any("site-packages" in p for p in sys.path), "" in sys.path)\nimport numpy')
  result = run_python(code)
  assert result.stdout == "False ['program.py']\nFalse False\n"
  assert "No module named 'numpy'" in result.stderr


def test_a_program_says_the_same_every_time():
  code = 'print({str(i) for i in range(50)}, hash("a"))'
  assert run_python(code) == run_python(code)


def test_the_folder_goes_with_the_program(tmp_path, monkeypatch):
  monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
  result = run_python('import os; open("a", "w").write("x")\n'
                      'for _ in range(1100): os.mkdir("d"); os.chdir("d")\nprint("done")')
  assert result.stdout == 'done\n'
  assert list(tmp_path.iterdir()) == []


def test_a_folder_goes_though_its_rights_were_taken():
  code = """if True:
    import os, tempfile
    from zppo_jax.agents import sandbox
    if os.getuid() == 0:  # whom no rights stop
      os.setuid(65534)
    folder = tempfile.mkdtemp(dir='/tmp')
    os.makedirs(f'{folder}/a/b')
    os.chmod(f'{folder}/a', 0)
    sandbox._remove(folder)
    print(os.path.exists(folder))"""
  out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=60)
  assert out.stdout == 'False\n', out.stderr


def test_wall_limit():
  result, seconds = timed('print("begun", flush=True)\nimport time; time.sleep(60)',
                          limits=Limits(wall_s=0.3))
  assert (result.stdout, result.status) == ('begun\n', 'timeout')
  assert 0.3 <= seconds < 3


def test_wall_limit_of_a_program_that_closed_its_output():
  code = 'import os, time; os.close(1); os.close(2); time.sleep(60)'
  result, seconds = timed(code, limits=Limits(wall_s=0.3))
  assert result.status == 'timeout' and seconds < 3


def test_cpu_limit():
  result, seconds = timed('while True: pass', limits=Limits(cpu_s=1, wall_s=30))
  assert result.status == 'timeout' and seconds < 15


def test_memory_limit():
  code = 'x = bytearray(300 << 20); print(len(x) >> 20)'
  assert run_python(code).stdout == '300\n'
  result = run_python(code, limits=Limits(memory_bytes=200 << 20))
  assert result.status == 'error' and result.stderr.endswith('MemoryError\n')


def test_file_limit():
  code = 'with open("f", "wb") as f: f.write(bytes(5000))\nprint("written")'
  assert run_python(code).stdout == 'written\n'
  result = run_python(code, limits=Limits(file_bytes=4096))
  assert result.status == 'error' and 'File too large' in result.stderr


PROCESSES = {
  'fork': 'import os\nif os.fork() == 0: os._exit(0)\nos.wait()',
  'subprocess': 'import subprocess; subprocess.run(["true"], check=True)',
  'system': 'import os; os.system("true")',
  'spawn': 'import os; os.waitpid(os.posix_spawn("/bin/true", ["true"], {}), 0)',
  'thread': 'import threading; t = threading.Thread(target=int); t.start(); t.join()',
  'kernel': 'import resource; assert resource.getrlimit(resource.RLIMIT_NPROC)[1] != 0'}


@pytest.mark.parametrize('name', sorted(PROCESSES))
def test_processes_and_threads_are_refused_unless_allowed(name):
  assert run_python(PROCESSES[name]).status == 'error'
  assert run_python(PROCESSES[name], limits=Limits(processes=True)) == Result('', '', 'ok', 0)


def is_alive(process_id):
  """Whether it runs, looked at for as long as init may need to reap it."""
  for _ in range(100):
    try:
      state = pathlib.Path(f'/proc/{process_id}/stat').read_text().rpartition(')')[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
      return False
    if state == 'Z':
      return False
    time.sleep(0.02)
  return True


@pytest.mark.parametrize(('end', 'status'), [('', 'ok'), ('os.wait()', 'timeout')])
def test_processes_end_with_the_program(end, status):
  code = f"""if True:
    import os, time
    child = os.fork()
    if child == 0:
      time.sleep(60)
    print(child, flush=True)
    {end}"""
  result, seconds = timed(code, limits=Limits(processes=True, wall_s=1 if end else 30))
  assert result.status == status and seconds < 15  # though the child holds the pipes open
  assert not is_alive(int(result.stdout))


def test_the_network_is_refused():
  code = 'import socket; socket.create_connection(("127.0.0.1", 9))'
  assert 'not allowed' in run_python(code).stderr
  code = """if True:
    import socket
    to = '127.0.0.1', 9
    own = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    for call in (lambda: own.connect(to), lambda: own.bind(to), lambda: own.sendto(b'x', to),
                 lambda: own.sendmsg([b'x'], [], 0, to), lambda: socket.gethostbyname('h'),
                 lambda: socket.gethostbyaddr('::1'), lambda: socket.getnameinfo(to, 0)):
      try:
        call()
      except PermissionError as error:
        print(str(error).endswith('is not allowed in the sandbox'))"""
  assert run_python(code).stdout == 7 * 'True\n'
  event_loop = 'import asyncio\nasync def f(): return 3\nprint(asyncio.run(f()))'
  assert run_python(event_loop).stdout == '3\n'


def test_a_flood_of_output_is_cut_while_it_is_read():
  code = 'import sys\nwhile True: sys.stdout.write("ä" * 50_000)'
  tracemalloc.start()
  try:
    result = run_python(code, limits=Limits(wall_s=0.7, output_bytes=1000))
    peak = tracemalloc.get_traced_memory()[1]
  finally:
    tracemalloc.stop()
  assert result.status == 'timeout' and peak < 2 << 20
  assert result.stdout.endswith('\n[cut at 1000 bytes]') and '\ufffd' not in result.stdout
  assert 990 <= len(result.stdout.encode()) <= 1000


def test_long_output_that_ends_is_no_fault():
  result = run_python('print("x" * 300_000)\nimport sys; print("end", file=sys.stderr)')
  assert result.status == 'ok' and result.stderr == 'end\n' and len(result.stdout) == 16384


def test_output_that_is_not_utf8():
  result = run_python(r'import sys; sys.stdout.buffer.write(b"a\xff\xfeb\xe2\x82")')
  assert result.stdout == 'a\ufffd\ufffdb\ufffd'


def test_death_by_a_signal():
  result = run_python('import os; print("x", flush=True); os.kill(os.getpid(), 11)')
  assert result == Result('x\n', '', 'killed', -11)


def test_runs_from_many_threads_at_once():
  results = {}
  threads = [threading.Thread(target=lambda i=i: results.update({i: run_python(f'print({i})')}))
             for i in range(8)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(30)
  assert {i: r.stdout for i, r in results.items()} == {i: f'{i}\n' for i in range(8)}


def test_no_descriptor_stays_open():
  run_python('pass')
  before = len(os.listdir('/proc/self/fd'))
  for _ in range(3):
    run_python('pass')
  assert len(os.listdir('/proc/self/fd')) == before


@pytest.mark.parametrize('length', range(60, 70))
def test_cut_falls_between_characters(length):
  text = 'x' + 'aä€\U0001f600' * 40
  cut = sandbox.cut(text.encode(), length)
  kept, marker = cut.split('\n')
  assert text.startswith(kept) and marker == f'[cut at {length} bytes]'
  assert length - 3 <= len(cut.encode()) <= length
  assert sandbox.cut(text.encode(), len(text.encode())) == text


@pytest.mark.parametrize('wrong', [{'wall_s': 0}, {'cpu_s': -1},
                                   {'cpu_s': float('inf')}, {'memory_bytes': 0},
                                   {'output_bytes': 0}, {'file_bytes': -1}])
def test_limits_are_checked(wrong):
  with pytest.raises(ValueError, match=next(iter(wrong))):
    Limits(**wrong)
