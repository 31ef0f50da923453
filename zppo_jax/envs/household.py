"""A household in words: ALFWorld's actions and goals over a small frozen state, no simulator.

`step` is a pure transition; `HouseholdEnv` is the shell around it. Nothing is random after `make`.
Format: https://arxiv.org/abs/2010.03768.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

from zppo_jax.core import rng, types
from zppo_jax.envs import api

HAND = 'hand'  # the place of a thing that the agent carries; it carries one at most
OPENABLE = frozenset({'cabinet', 'drawer', 'fridge', 'microwave'})
LAMPS = ('desklamp', 'floorlamp')
_SURFACES = ('armchair', 'countertop', 'desk', 'diningtable', 'shelf', 'sidetable')
TARGETS = ('cabinet', 'drawer', 'fridge') + _SURFACES
_FOOD = ('apple', 'bread', 'egg', 'lettuce', 'potato', 'tomato')
_DISHES = ('bowl', 'cup', 'mug', 'pan', 'plate')
_CUTLERY = ('fork', 'knife', 'ladle', 'spatula', 'spoon')
_SMALL = ('book', 'cellphone', 'creditcard', 'keychain', 'newspaper', 'pen', 'vase', 'watch')
_ANY = _FOOD + _DISHES + _CUTLERY + _SMALL
TRAIT = {'heat': 'hot', 'cool': 'cold', 'clean': 'clean'}  # what a verb does to a thing
UNDOES = {'hot': 'cold', 'cold': 'hot'}
APPLIANCE = {'heat': 'microwave', 'cool': 'fridge', 'clean': 'sinkbasin'}
ABLE = {
  'heat': ('apple', 'bread', 'cup', 'egg', 'mug', 'plate', 'potato', 'tomato'),
  'cool': _FOOD + _DISHES,
  'clean': ('apple', 'lettuce', 'potato', 'tomato') + _DISHES + _CUTLERY,
}
OBJECTS = {'place': _ANY, **ABLE, 'two': _ANY, 'look': _SMALL}  # kind of goal: its things
SIZES = {1: (9, 4), 2: (15, 10), 3: (24, 20)}  # difficulty: receptacles, other things


@dataclasses.dataclass(frozen=True)
class World:
  """What never changes in an episode."""

  receptacles: tuple[str, ...]
  kind: str  # a key of OBJECTS
  object: str  # a type, as is the target
  target: str  # of 'look' a lamp


@dataclasses.dataclass(frozen=True)
class Thing:
  """`place` is a receptacle or HAND; lamps stay where they are. `traits` are sorted."""

  name: str
  place: str
  traits: tuple[str, ...] = ()  # 'hot' or 'cold', 'clean'; of a lamp 'on'


@dataclasses.dataclass(frozen=True)
class State:
  """Equal states have equal `repr`: what has no order is sorted."""

  things: tuple[Thing, ...]
  at: str = ''  # '' = in the middle of the room
  opened: tuple[str, ...] = ()


def kind_of(name: str) -> str:
  """The type of a name: 'mug' of 'mug 2'."""
  return name.rpartition(' ')[0]


def make(split: str, index: int, *, difficulty: int = 2) -> api.Task:
  """Task `index` of a split, the kinds of goals in turn. ValueError: bad split or difficulty."""
  if split not in ('train', 'heldout') or difficulty not in SIZES:
    raise ValueError(f"need 'train' or 'heldout' and a key of SIZES, got {split!r}, {difficulty!r}")
  draw = rng.host_rng(0, 'household', split, difficulty, index)
  kind = tuple(OBJECTS)[index % len(OBJECTS)]
  # every type is in both splits, no pair of object and target is
  targets = LAMPS if kind == 'look' else TARGETS
  pairs = itertools.product(enumerate(OBJECTS[kind]), enumerate(targets))
  own = [(o, t) for (i, o), (j, t) in pairs if ((i + j) % 4 == 3) == (split == 'heldout')]
  item, target = own[draw.integers(len(own))]
  num_receptacles, num_others = SIZES[difficulty]
  kinds = [*APPLIANCE.values(), 'countertop', 'desk'] + [target] * (kind != 'look')
  kinds += draw.choice(TARGETS, num_receptacles - len(kinds)).tolist()
  receptacles = _number(kinds)
  names = draw.choice([o for o in _ANY if o != item], num_others).tolist()
  names += [item] * (3 if kind == 'two' else 1)
  # at the lowest difficulty all lies in the open; nothing that is asked for starts at a target
  free = [r for r in receptacles if difficulty > 1 or kind_of(r) not in OPENABLE]
  away = [r for r in free if kind_of(r) != target]
  things = [[f'{target if kind == "look" else LAMPS[0]} 1', 'desk 1']]
  for name in _number(names):
    things.append([name, str(draw.choice(away if kind_of(name) == item else free))])
  args = {'receptacles': receptacles, 'things': things, 'goal': [kind, item, target]}
  return api.Task(f'household/{split}/{difficulty}/{index}', args, group=kind)


def _number(kinds: Sequence[str]) -> list[str]:
  return [f'{k} {i + 1}' for k in sorted(set(kinds)) for i in range(kinds.count(k))]


def start(task: api.Task) -> tuple[World, State]:
  """The world and the first state of a task."""
  things = tuple(Thing(name, place) for name, place in task.args['things'])
  return World(tuple(task.args['receptacles']), *task.args['goal']), State(things)


def goal_text(world: World) -> str:
  """The goal in words."""
  if world.kind == 'look':
    return f'look at a {world.object} under a {world.target}'
  what = f'two {world.object}s' if world.kind == 'two' else f'a {world.object}'
  what = f'a {TRAIT[world.kind]} {world.object}' if world.kind in TRAIT else what
  return f'put {what} in/on {"the same" if world.kind == "two" else "a"} {world.target}'


def progress(world: World, state: State) -> float:
  """Share of the sub-goals that hold: 1 exactly when the goal is reached."""
  mine = _asked_for(world, state)
  if world.kind == 'look':
    lamps = [t for t in state.things if kind_of(t.name) == world.target and t.place == state.at]
    return (any(t.place == HAND for t in mine) + any('on' in t.traits for t in lamps)) / 2
  need, trait = (2 if world.kind == 'two' else 1), TRAIT.get(world.kind)
  targets = [r for r in world.receptacles if kind_of(r) == world.target]
  scores = [sorted(_score(t, r, trait) for t in mine)[-need:] for r in targets]
  return max(map(sum, scores)) / (need * (3 if trait else 2))


def _score(thing: Thing, target: str, trait: str | None) -> int:
  done = _is_done(thing, target, trait)  # picked up, given the trait, at the target with it
  return (done or thing.place == HAND) + (trait in thing.traits) + done


def _is_done(thing: Thing, target: str, trait: str | None) -> bool:
  return thing.place == target and (trait is None or trait in thing.traits)


def _asked_for(world: World, state: State) -> list[Thing]:
  return [t for t in state.things if kind_of(t.name) == world.object]


def _held(state: State) -> Thing | None:
  return next((t for t in state.things if t.place == HAND), None)


def _is_open(state: State) -> bool:
  return state.at != '' and (kind_of(state.at) not in OPENABLE or state.at in state.opened)


def actions(world: World, state: State) -> Iterator[str]:
  """Every action that works now."""
  yield from ('look', 'inventory')
  yield from (f'go to {r}' for r in world.receptacles if r != state.at)
  at, held = state.at, _held(state)
  if at:
    yield f'examine {at}'
  if kind_of(at) in OPENABLE:
    yield f'close {at}' if at in state.opened else f'open {at}'
  if _is_open(state):
    for name in [t.name for t in state.things if t.place == at]:
      yield f'examine {name}'
      if kind_of(name) in LAMPS:
        yield f'use {name}'
      elif held is None:
        yield f'take {name} from {at}'
  if held is not None:
    yield f'examine {held.name}'
    if _is_open(state):
      yield f'put {held.name} in/on {at}'
    for verb, appliance in APPLIANCE.items():
      if kind_of(at) == appliance and kind_of(held.name) in ABLE[verb]:
        yield f'{verb} {held.name} with {at}'


def step(world: World, state: State, action: str) -> tuple[State, str, bool]:
  """The next state, what the agent reads, and whether the action worked; total on strings."""
  action = ' '.join(action.lower().split())
  if action not in actions(world, state):
    return state, 'Nothing happens.', False
  state = _apply(state, action)
  verb, name = _parts(action)
  thing = next((t for t in state.things if t.name == name), None)
  if verb == 'inventory':
    held = _held(state)
    return state, f'You carry: {held.name if held else "nothing"}.', True
  if verb in ('look', 'go', 'open', 'examine') and thing is None:
    return state, _describe(world, state), True
  if verb in ('use', 'examine'):
    return state, f'The {name} is {" and ".join(thing.traits) or "as it was made"}.', True
  return state, f'You {action}.', True


def _parts(action: str) -> tuple[str, str]:
  verb, _, rest = action.partition(' ')  # 'take', 'mug 2' of 'take mug 2 from shelf 1'
  return verb, re.split(r' from | in/on | with ', rest.removeprefix('to '))[0]


def _apply(state: State, action: str) -> State:
  """Carries out an action that works."""
  verb, name = _parts(action)
  if verb == 'go':
    return replace(state, at=name)
  if verb in ('open', 'close'):
    return replace(state, opened=tuple(sorted({*state.opened} ^ {name})))
  old = next((t for t in state.things if t.name == name), None)
  if verb in ('take', 'put'):
    new = replace(old, place=HAND if verb == 'take' else state.at)
  elif verb in TRAIT:
    traits = {*old.traits, TRAIT[verb]} - {UNDOES.get(TRAIT[verb])}
    new = replace(old, traits=tuple(sorted(traits)))
  elif verb == 'use':
    new = replace(old, traits=() if old.traits else ('on',))
  else:
    return state
  return replace(state, things=tuple(new if t is old else t for t in state.things))


def _describe(world: World, state: State) -> str:
  if not state.at:
    return f'You are in the middle of a room. Around you: {", ".join(world.receptacles)}.'
  if not _is_open(state):
    return f'You are at {state.at}. It is closed.'
  names = [t.name for t in state.things if t.place == state.at]
  return f'You are at {state.at}. In/on it: {", ".join(names) or "nothing"}.'


def expert(world: World, state: State) -> list[str]:
  """Actions that win from any state; not always the fewest."""
  plan = []
  while progress(world, state) < 1:
    plan.append(_next(world, state))
    state, _, _ = step(world, state, plan[-1])
  return plan


def _next(world: World, state: State) -> str:
  mine, held, trait = _asked_for(world, state), _held(state), TRAIT.get(world.kind)
  if held is not None and held not in mine:  # the hand must be free first
    place = state.at or world.receptacles[0]
    return _there(state, place, f'put {held.name} in/on {place}')
  lamp = next((t for t in state.things if kind_of(t.name) == world.target), None)
  targets = [r for r in world.receptacles if kind_of(r) == world.target]
  target = max(targets, key=lambda r: sum(_is_done(t, r, trait) for t in mine), default='')
  if held is None:
    item = next(t for t in mine if lamp or not _is_done(t, target, trait))
    return _there(state, item.place, f'take {item.name} from {item.place}')
  if lamp:
    return _there(state, lamp.place, f'use {lamp.name}')
  if trait and trait not in held.traits:
    place = next(r for r in world.receptacles if kind_of(r) == APPLIANCE[world.kind])
    return _there(state, place, f'{world.kind} {held.name} with {place}')
  return _there(state, target, f'put {held.name} in/on {target}')


def _there(state: State, place: str, action: str) -> str:
  """The action, or what must come before it: go there, open it."""
  if state.at != place:
    return f'go to {place}'
  return action if _is_open(state) else f'open {place}'


class HouseholdEnv:
  """One episode at a time: reward 1 and the end when the goal is reached; no limit of steps."""

  def __init__(self):
    self.game = World((), 'look', '', ''), State(())

  def reset(self, task: api.Task, seed: int = 0) -> api.Observation:
    """Starts a task; `seed` changes nothing, for nothing is drawn."""
    self.game = start(task)
    return self._see(f'{_describe(*self.game)}\nYour task: {goal_text(self.game[0])}.')

  def step(self, action: str | Sequence[types.ToolCall]) -> api.StepResult:
    """Tool calls and unknown words change nothing: `info['valid']` is false."""
    if progress(*self.game) == 1:
      return api.StepResult(self._see('The task is done.'), 0.0, True, 1.0, {'valid': False})
    state, text, valid = step(*self.game, action if isinstance(action, str) else '')
    self.game = self.game[0], state
    reached = progress(*self.game)
    reward = float(reached == 1)
    return api.StepResult(self._see(text), reward, reward == 1, reached, {'valid': valid})

  def clone(self) -> HouseholdEnv:
    return copy.copy(self)  # all that it holds is frozen

  def expert(self) -> list[str]:
    return expert(*self.game)

  def state_hash(self) -> str:
    return hashlib.blake2b(repr(self.game).encode(), digest_size=16).hexdigest()

  def close(self) -> None:
    """Nothing to free."""

  def _see(self, text: str) -> api.Observation:
    return api.Observation(text, tuple(actions(*self.game)))
