"""A web shop in words: search a seeded catalogue, open items, choose options, buy one.

`step` is a pure transition; `ShopEnv` is the shell around it. Format: https://arxiv.org/abs/2207.01206.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import functools
import hashlib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from zppo_jax.core import rng, types
from zppo_jax.envs import api

PAGE = 10  # items on a page of results
CATEGORIES = (
  'backpack', 'blanket', 'candle', 'chair', 'headphones', 'jacket', 'kettle', 'lamp', 'mug',
  'notebook', 'pillow', 'rug', 'sneakers', 'speaker', 'umbrella', 'wallet',
)  # fmt: skip
ATTRIBUTES = (
  'antique', 'breathable', 'compact', 'durable', 'eco-friendly', 'foldable', 'handmade',
  'heavy-duty', 'insulated', 'lightweight', 'organic', 'quiet', 'rechargeable', 'soft', 'washable',
)  # fmt: skip
OPTIONS = {  # no value belongs to two names: a click names the value alone
  'color': ('black', 'blue', 'green', 'grey', 'red', 'white'),
  'size': ('small', 'medium', 'large', 'extra large'),
  'pack': ('single', 'pack of 2', 'pack of 6'),
}
BRANDS = ('Alder', 'Birch', 'Cedar', 'Juniper', 'Maple', 'Rowan', 'Spruce', 'Willow')
SIZES = {1: (60, 1, 0), 2: (300, 2, 1), 3: (1000, 3, 2)}  # difficulty: items, attributes, options


@dataclasses.dataclass(frozen=True)
class Item:
  """One article; the first attribute is its category. `options` are (name, values) pairs."""

  id: str
  title: str
  attributes: tuple[str, ...]
  options: tuple[tuple[str, tuple[str, ...]], ...]
  cents: int


@dataclasses.dataclass(frozen=True)
class Goal:
  """What is to be bought: attributes (the category first), option values, and the highest price."""

  attributes: tuple[str, ...]
  options: tuple[tuple[str, str], ...]
  max_cents: int

  def text(self) -> str:
    wishes = [*self.attributes, *(f'{name} {value}' for name, value in self.options)]
    return f'{", ".join(wishes)}, for at most ${self.max_cents / 100:.2f}'


@dataclasses.dataclass(frozen=True)
class Catalogue:
  """`ids_of` maps a word to the ids of the items whose title has it."""

  seed: int
  items: dict[str, Item]
  ids_of: dict[str, tuple[str, ...]]


@dataclasses.dataclass(frozen=True)
class State:
  """`results` is None before the first search; `item` is the open page; `chosen` is sorted."""

  results: tuple[str, ...] | None = None
  page: int = 0
  item: str = ''
  chosen: tuple[tuple[str, str], ...] = ()
  bought: bool = False


def words(text: str) -> list[str]:
  """The words that search compares."""
  return re.findall(r'[a-z0-9]+', text.lower())


@functools.lru_cache(maxsize=4)
def catalogue(seed: int, size: int) -> Catalogue:
  """`size` items, the same for the same arguments."""
  items = {}
  for number in range(size):
    draw = rng.host_rng(seed, 'catalogue', number)
    category = CATEGORIES[draw.integers(len(CATEGORIES))]
    own = sorted(draw.choice(ATTRIBUTES, 4, replace=False).tolist())
    names = sorted(draw.choice(list(OPTIONS), draw.integers(2, 4), replace=False).tolist())
    options = tuple((n, tuple(sorted(_some(draw, OPTIONS[n])))) for n in names)
    title = f'{BRANDS[draw.integers(len(BRANDS))]} {" ".join(own)} {category}'
    item = Item(f'b{number:04}', title, (category, *own), options, int(draw.integers(500, 20000)))
    items[item.id] = item
  ids_of = collections.defaultdict(list)
  for item in items.values():
    for word in dict.fromkeys(words(item.title)):
      ids_of[word].append(item.id)
  return Catalogue(seed, items, {word: tuple(ids) for word, ids in ids_of.items()})


def _some(draw, values: Sequence[str]) -> list[str]:
  return draw.choice(values, draw.integers(2, len(values) + 1), replace=False).tolist()


def search(shelf: Catalogue, query: str) -> tuple[str, ...]:
  """Ids of the items that share words with the query: most words first, ties by id."""
  found = (shelf.ids_of.get(word, ()) for word in set(words(query)))
  counts = collections.Counter(itertools.chain.from_iterable(found))
  return tuple(sorted(sorted(counts), key=counts.get, reverse=True))


def split_of(attributes: Sequence[str]) -> str:
  """The split that a goal's attributes (category first) belong to: no goal is in both."""
  category, *others = attributes
  total = CATEGORIES.index(category) + sum(ATTRIBUTES.index(a) for a in others)
  return 'heldout' if total % 4 == 3 else 'train'


def make(split: str, index: int, *, difficulty: int = 2) -> api.Task:
  """Task `index` of a split; at least one item fits. ValueError for a bad split or difficulty."""
  if split not in ('train', 'heldout') or difficulty not in SIZES:
    raise ValueError(f"need 'train' or 'heldout' and a key of SIZES, got {split!r}, {difficulty!r}")
  size, num_attributes, num_options = SIZES[difficulty]
  shelf = catalogue(0, size)
  draw = rng.host_rng(0, 'shop', split, difficulty, index)
  own = []
  while not own:  # most items have some combination in either split
    item = shelf.items[f'b{draw.integers(size):04}']
    picks = itertools.combinations(item.attributes[1:], num_attributes)
    own = [p for p in picks if split_of((item.attributes[0], *p)) == split]
  attributes = [item.attributes[0], *own[draw.integers(len(own))]]
  names = sorted(draw.choice([n for n, _ in item.options], num_options, replace=False).tolist())
  options = [[n, str(draw.choice(values))] for n, values in item.options if n in names]
  goal = {'attributes': attributes, 'options': options, 'max_cents': -(-item.cents // 1000) * 1000}
  args = {'catalogue': [0, size], 'goal': goal}
  return api.Task(f'shop/{split}/{difficulty}/{index}', args, group=attributes[0])


def start(task: api.Task) -> tuple[Catalogue, Goal, State]:
  """The catalogue, the goal and the first state of a task."""
  goal = task.args['goal']
  options = tuple((name, value) for name, value in goal['options'])
  goal = Goal(tuple(goal['attributes']), options, goal['max_cents'])
  return catalogue(*task.args['catalogue']), goal, State()


def reward(goal: Goal, item: Item, chosen: Mapping[str, str]) -> float:
  """Share of the attributes, options and the price rule that hold: 1 on an exact match."""
  matched = sum(a in item.attributes for a in goal.attributes)
  matched += sum(chosen.get(name) == value for name, value in goal.options)
  matched += item.cents <= goal.max_cents
  return matched / (len(goal.attributes) + len(goal.options) + 1)


def progress(shelf: Catalogue, goal: Goal, state: State) -> float:
  """Share of the sub-goals that hold for the open item, its purchase being one of them."""
  if not state.item:
    return 0.0
  number = len(goal.attributes) + len(goal.options) + 1
  matched = reward(goal, shelf.items[state.item], dict(state.chosen)) * number
  return (round(matched) + state.bought) / (number + 1)


def actions(shelf: Catalogue, goal: Goal, state: State) -> Iterator[str]:
  """Every click that works now, and one search of the many."""
  if state.bought:
    return
  yield f'search[{goal.attributes[0]}]'
  if state.item:
    yield from ('buy', 'click[back]')
    for _, values in shelf.items[state.item].options:
      yield from (f'click[{value}]' for value in values)
  elif state.results:
    yield from (f'click[{i}]' for i in _page(state))
    if state.page:
      yield 'click[previous]'
    if (state.page + 1) * PAGE < len(state.results):
      yield 'click[next]'


def _page(state: State) -> tuple[str, ...]:
  return (state.results or ())[state.page * PAGE : (state.page + 1) * PAGE]


def step(shelf: Catalogue, goal: Goal, state: State, action: str) -> tuple[State, bool]:
  """The next state and whether the action worked; total on strings."""
  action = ' '.join(action.lower().split())
  query = action.removeprefix('search[') if action.endswith(']') else action
  if query != action and words(query) and not state.bought:
    return State(search(shelf, query)), True
  if action not in actions(shelf, goal, state):
    return state, False
  name = action.removeprefix('click[').removesuffix(']')
  match name:
    case 'buy':
      return replace(state, bought=True), True
    case 'back':
      return replace(state, item='', chosen=()), True
    case 'next' | 'previous':
      return replace(state, page=state.page + (1 if name == 'next' else -1)), True
  if not state.item:
    return replace(state, item=name), True
  option = next(n for n, values in shelf.items[state.item].options if name in values)
  return replace(state, chosen=tuple(sorted({**dict(state.chosen), option: name}.items()))), True


def describe(shelf: Catalogue, state: State) -> str:
  """The page that the state shows."""
  if state.bought:
    return 'Thank you for your order.'
  if state.item:
    item, chosen = shelf.items[state.item], dict(state.chosen)
    lines = [f'{item.title}, ${item.cents / 100:.2f}']
    for name, values in item.options:
      lines.append(f'{name}: {", ".join(values)} (chosen: {chosen.get(name, "none")})')
    return '\n'.join(lines)
  if state.results is None:
    return 'Welcome to the shop. Search for something.'
  lines = [f'Page {state.page + 1}, {len(state.results)} results']
  for i in _page(state):
    lines.append(f'{i}: {shelf.items[i].title}, ${shelf.items[i].cents / 100:.2f}')
  return '\n'.join(lines)


def expert(shelf: Catalogue, goal: Goal, state: State) -> list[str]:
  """Actions that buy an exact match from any state: searches anew, looks at every page."""
  if state.bought:
    return []
  results = search(shelf, ' '.join(goal.attributes))
  wanted = dict(goal.options)
  for place, item in enumerate(shelf.items[i] for i in results):
    offered = {(name, value) for name, values in item.options for value in values}
    if offered.issuperset(goal.options) and reward(goal, item, wanted) == 1:
      clicks = ['click[next]'] * (place // PAGE) + [f'click[{item.id}]']
      clicks += [f'click[{value}]' for value in wanted.values()]
      return [f'search[{" ".join(goal.attributes)}]', *clicks, 'buy']
  raise ValueError(f'no item of the catalogue fits {goal}')


class ShopEnv:
  """One episode at a time: it ends with the purchase, whose `reward` it pays; no limit of steps."""

  def __init__(self):
    self.game = Catalogue(0, {}, {}), Goal((), (), 0), State(bought=True)

  def reset(self, task: api.Task, seed: int = 0) -> api.Observation:
    """Starts a task; `seed` changes nothing, for nothing is drawn."""
    self.game = start(task)
    shelf, goal, state = self.game
    return self._see(f'{describe(shelf, state)}\nYour task: buy this: {goal.text()}.')

  def step(self, action: str | Sequence[types.ToolCall]) -> api.StepResult:
    """Tool calls and unknown words change nothing: `info['valid']` is false."""
    shelf, goal, before = self.game
    state, valid = step(shelf, goal, before, action if isinstance(action, str) else '')
    self.game = shelf, goal, state
    paid = 0.0
    if state.bought and not before.bought:
      paid = reward(goal, shelf.items[state.item], dict(state.chosen))
    text = describe(shelf, state) if valid else f'Nothing happens.\n{describe(shelf, state)}'
    reached = progress(shelf, goal, state)
    return api.StepResult(self._see(text), paid, state.bought, reached, {'valid': valid})

  def clone(self) -> ShopEnv:
    return copy.copy(self)  # all that it holds is frozen, or the catalogue, which nobody changes

  def expert(self) -> list[str]:
    return expert(*self.game)

  def state_hash(self) -> str:
    shelf, goal, state = self.game
    told = repr((shelf.seed, len(shelf.items), goal, state))
    return hashlib.blake2b(told.encode(), digest_size=16).hexdigest()

  def close(self) -> None:
    """Nothing to free."""

  def _see(self, text: str) -> api.Observation:
    return api.Observation(text, tuple(actions(*self.game)))
