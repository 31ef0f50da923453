"""The `agent` section of a config: answers of several turns, with tools."""

from __future__ import annotations

from typing import Any

from zppo_jax.agents import builtin_tools, parsing, react
from zppo_jax.agents import tools as tools_lib
from zppo_jax.launch.config import Problem, check_enum
from zppo_jax.train import episodes


def _tools(config: Any) -> dict[str, tools_lib.Tool]:
  return tools_lib.toolbox(*(builtin_tools.TOOLS[name]() for name in config.agent.tools))


def build_episodes(config: Any) -> episodes.Episodes | None:
  """How questions are answered with the tools of a config, None without tools."""
  a = config.agent
  if not a.tools:
    return None
  tools = _tools(config)
  agent = react.tool_agent([t.spec for t in tools.values()], a.parser, system='')
  return episodes.Episodes(agent, tools, a.max_turns, a.turn_tokens or
                           config.rollout.max_new_tokens)


def system_text(config: Any) -> str:
  """What opens every chat: the tools and how to call them, in the words of the config."""
  specs = [t.spec for t in _tools(config).values()]
  return config.agent.system.replace('{tools}', parsing.tools_text(specs, config.agent.parser))


def problems(config: Any) -> list[Problem]:
  """What is wrong with the section."""
  a, found = config.agent, []
  for name in a.tools:
    found += check_enum('agent.tools', name, builtin_tools.TOOLS)
  if len(set(a.tools)) < len(a.tools):
    found.append(Problem('agent.tools', f'names a tool twice: {tuple(a.tools)}'))
  found += check_enum('agent.parser', a.parser, parsing.PARSERS)
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
