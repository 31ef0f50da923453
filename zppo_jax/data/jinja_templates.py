"""Chat templates in Jinja, as models ship them, run in a sandbox with limits."""

from __future__ import annotations

import ctypes
import datetime
import json
import pathlib
import threading
from collections.abc import Callable

from zppo_jax.data import templates

MAX_CHARACTERS = 1_000_000
MAX_SECONDS = 2.0


class TemplateError(ValueError):
  """A template that is invalid, raises, breaks out of the sandbox or exceeds a limit."""


class MissingTemplateError(TemplateError):
  """A tokenizer that came without a template."""


class _Stop(BaseException):
  """Ends a rendering thread; not an Exception, so that no template code path swallows it."""


def _raise(message: str):
  raise TemplateError(f'chat template: {message}')


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
  return json.dumps(
    value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
  )


def _environment(now: Callable[[], datetime.datetime]):
  """An immutable sandbox with the helpers that Hugging Face templates expect."""
  import jinja2.ext
  import jinja2.sandbox

  class Generation(jinja2.ext.Extension):
    """Accepts `{% generation %}..{% endgeneration %}` and keeps its body."""

    tags = {'generation'}

    def parse(self, parser):
      line = next(parser.stream).lineno
      body = parser.parse_statements(('name:endgeneration',), drop_needle=True)
      return jinja2.nodes.Scope(body).set_lineno(line)

  class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Also bounds repetition and powers, which would take the memory before the clock stops."""

    intercepted_binops = frozenset({'*', '**'})

    def call_binop(self, context, operator, left, right):
      del context
      if operator == '**' or not all(isinstance(x, int | float) for x in (left, right)):
        size = max((x for x in (left, right) if isinstance(x, int)), default=0)
        if size > 1000:
          _raise(f'{operator} with {size} is refused')
      return left**right if operator == '**' else left * right

  environment = Sandbox(
    trim_blocks=True, lstrip_blocks=True, extensions=['jinja2.ext.loopcontrols', Generation]
  )
  environment.filters['tojson'] = _tojson
  environment.globals['raise_exception'] = _raise
  environment.globals['strftime_now'] = lambda form: now().strftime(form)
  return environment


def _run(compiled, values: dict) -> str:
  """Renders on a thread that is stopped after MAX_SECONDS; TemplateError for every failure."""
  outcome: dict[str, object] = {}

  def work():
    try:
      parts, size = [], 0
      for part in compiled.generate(**values):
        parts.append(part)
        size += len(part)
        if size > MAX_CHARACTERS:
          _raise(f'output exceeds {MAX_CHARACTERS} characters')
      outcome['text'] = ''.join(parts)
    except _Stop:
      pass
    except Exception as error:  # whatever a foreign template raises is reported as its fault
      outcome['error'] = error

  thread = threading.Thread(target=work, daemon=True)
  thread.start()
  thread.join(MAX_SECONDS)
  if thread.is_alive():
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
      ctypes.c_ulong(thread.ident), ctypes.py_object(_Stop)
    )
    _raise(f'rendering took more than {MAX_SECONDS} s')
  error = outcome.get('error')
  if isinstance(error, TemplateError):
    raise error
  if error is not None:
    raise TemplateError(f'chat template: {type(error).__name__}: {error}') from error
  return outcome['text']


def jinja_template(
  source: str,
  name: str = 'jinja',
  *,
  stop: str | None = None,
  now: Callable[[], datetime.datetime] = datetime.datetime.now,
) -> templates.Template:
  """A Template from Jinja source; TemplateError if it does not compile. `now` is the clock."""
  import jinja2

  try:
    compiled = _environment(now).from_string(source)
  except jinja2.TemplateError as error:
    raise TemplateError(f'chat template {name!r} does not compile: {error}') from error

  def form(messages, add_generation_prompt, bos, eos):
    chat = [{'role': m.role, 'content': m.content} for m in messages]
    values = {'messages': chat, 'add_generation_prompt': add_generation_prompt}
    return _run(compiled, values | {'bos_token': bos, 'eos_token': eos})

  return templates.Template(name, form, stop=stop)


def load_template(path: str | pathlib.Path, **kwargs) -> templates.Template:
  """A Template from chat_template.jinja, tokenizer_config.json, or a folder that holds either.

  Errors: FileNotFoundError with the expected layout, MissingTemplateError if the config has none,
  TemplateError if it does not compile.
  """
  path = pathlib.Path(path)
  found = [path] if path.is_file() else []
  if path.is_dir():
    options = (path / 'chat_template.jinja', path / 'tokenizer_config.json')
    found = [option for option in options if option.exists()]
  if not found:
    raise FileNotFoundError(
      f'{path}: expected chat_template.jinja or tokenizer_config.json with "chat_template"'
    )
  source = found[0].read_text(encoding='utf-8')
  if found[0].suffix == '.json':
    source = json.loads(source).get('chat_template')
  if isinstance(source, list):  # several named templates
    source = {entry['name']: entry['template'] for entry in source}.get('default')
  if not source:
    raise MissingTemplateError(f'{found[0]} has no "chat_template" (or none named "default")')
  return jinja_template(source, str(found[0]), **kwargs)
