"""The `agent` section of a config: answers of several turns, with tools."""

from __future__ import annotations

from typing import Any

from zppo_jax.agents import builtin_tools, parsing, react
from zppo_jax.agents import tools as tools_lib
from zppo_jax.core.errors import UserError
from zppo_jax.envs import source
from zppo_jax.launch.config import Problem, check_enum
from zppo_jax.train import episodes


def _tools(config: Any) -> dict[str, tools_lib.Tool]:
  return tools_lib.toolbox(*(builtin_tools.TOOLS[name]() for name in config.agent.tools))


def build_episodes(config: Any) -> episodes.Episodes | None:
  """How questions are answered with the tools of a config, None without tools."""
  a = config.agent
  if not a.tools and not a.env:
    return None
  most = a.turn_tokens or config.rollout.max_new_tokens
  if a.env:
    return episodes.Episodes(react.env_agent(), {}, a.max_turns, most,
                             source.ENVS[a.env].factory)
  tools = _tools(config)
  agent = react.tool_agent([t.spec for t in tools.values()], a.parser, system='')
  return episodes.Episodes(agent, tools, a.max_turns, most)


def system_text(config: Any) -> str:
  """What opens every chat: the tools and how to call them, in the words of the config."""
  specs = [t.spec for t in _tools(config).values()]
  return config.agent.system.replace('{tools}', parsing.tools_text(specs, config.agent.parser))


def env_source(config: Any, split: str) -> source.EnvSource:
  size = config.data.size if split == 'train' else config.data.eval_size
  return source.EnvSource(config.agent.env, split, size, config.agent.env_args.to_dict())


def _first_task(config: Any) -> list[Problem]:
  try:
    env_source(config, 'train')[0]
  except (UserError, ValueError, TypeError) as error:
    return [Problem('agent.env_args', str(error))]
  return []


def problems(config: Any) -> list[Problem]:
  """What is wrong with the section."""
  a, found = config.agent, []
  for name in a.tools:
    found += check_enum('agent.tools', name, builtin_tools.TOOLS)
  if len(set(a.tools)) < len(a.tools):
    found.append(Problem('agent.tools', f'names a tool twice: {tuple(a.tools)}'))
  found += check_enum('agent.parser', a.parser, parsing.PARSERS)
  found += check_enum('agent.env', a.env, ('', *source.ENVS))
  if a.env and a.tools:
    found.append(Problem('agent.tools', f'the policy acts in {a.env!r} and has no tools: leave '
                         f'them out, got {tuple(a.tools)}'))
  if a.env and config.data.path:
    found.append(Problem('data.path', f'agent.env={a.env!r} makes its own tasks: leave it empty'))
  if a.env in source.ENVS and not found:
    found += _first_task(config)
  if a.turn_tokens > config.rollout.max_new_tokens:
    found.append(Problem('agent.turn_tokens', f'{a.turn_tokens} is more than '
                         f'rollout.max_new_tokens = {config.rollout.max_new_tokens}, the room for '
                         'all turns'))
  if found or not a.tools:
    return found
  try:
    system_text(config)
  except ValueError as error:
    found.append(Problem('agent.parser', str(error)))
  return found
