"""The household, and the checks that every stand-in of ours passes."""

import hashlib
import itertools
import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zppo_jax.core import rng, types
from zppo_jax.envs import api, household, shop

STAND_INS = {'household': (household, household.HouseholdEnv), 'shop': (shop, shop.ShopEnv)}
every_stand_in = pytest.mark.parametrize('name', STAND_INS)
every_difficulty = pytest.mark.parametrize('difficulty', (1, 2, 3))


def begin(name, index=0, *, split='train', difficulty=2):
  module, factory = STAND_INS[name]
  env = factory()
  return env, env.reset(module.make(split, index, difficulty=difficulty), 0)


def walk(name, index, num_steps=60, avoid=()):
  """A random walk over admissible actions: yields the environment before every step."""
  env, observation = begin(name, index)
  draw = rng.host_rng(1, name, index)
  for _ in range(num_steps):
    yield env, observation
    actions = [a for a in observation.admissible if a not in avoid]
    if not actions:
      return
    observation = env.step(actions[draw.integers(len(actions))]).observation


def transcript(name):
  """All that environments say on random walks, and the tasks themselves."""
  said = [repr(STAND_INS[name][0].make('heldout', i)) for i in range(6)]
  for index in range(6):
    said += [f'{o.text}{o.admissible}{env.state_hash()}' for env, o in walk(name, index)]
  return hashlib.sha256('\n'.join(said).encode()).hexdigest()


@every_stand_in
def test_same_actions_give_the_same_bytes(name):
  assert transcript(name) == transcript(name)


def test_another_process_says_the_same():
  """Its strings have other hashes, so that the order of a set would show."""
  code = 'import household_test as t; print(*(t.transcript(name) for name in t.STAND_INS))'
  path = os.pathsep.join([os.path.dirname(__file__), *filter(None, sys.path)])
  env = os.environ | {'PYTHONHASHSEED': '7', 'PYTHONPATH': path}
  out = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, check=True)
  assert out.stdout.decode().split() == [transcript(name) for name in STAND_INS]


@every_stand_in
@every_difficulty
def test_expert_wins_and_progress_rises_to_one(name, difficulty):
  for split, index in [(s, i) for s in ('train', 'heldout') for i in range(60)]:
    env, _ = begin(name, index, split=split, difficulty=difficulty)
    plan = env.expert()
    results = [env.step(action) for action in plan]
    assert all(r.info['valid'] for r in results), (split, index)
    assert results[-1].done and sum(r.reward for r in results) == 1.0
    assert not any(r.done for r in results[:-1])
    values = [0.0] + [r.progress for r in results]
    assert values == sorted(values) and values[-1] == 1.0 and values[-2] < 1.0
    assert env.expert() == []


@every_stand_in
def test_expert_wins_from_wherever_one_has_strayed(name):
  for index in range(12):
    *_, (env, _) = walk(name, index, num_steps=40, avoid=('buy',))
    results = [env.step(action) for action in env.expert()]
    assert all(r.info['valid'] for r in results)
    assert results[-1].done and results[-1].progress == 1.0


@every_stand_in
def test_every_admissible_action_works_and_no_copy_disturbs_another(name):
  for index in range(6):
    for env, observation in walk(name, index, num_steps=15):
      before = env.state_hash()
      for action in observation.admissible:
        twin = env.clone()
        assert twin.state_hash() == before
        assert twin.step(action).info['valid'], action
        assert env.state_hash() == before
      assert len(set(observation.admissible)) == len(observation.admissible)


@every_stand_in
def test_a_copy_goes_the_same_way(name):
  env, _ = begin(name)
  plan = env.expert()
  env.step(plan[0])
  twin = env.clone()
  assert [env.step(a) for a in plan[1:]] == [twin.step(a) for a in plan[1:]]


@every_stand_in
def test_hashes_are_equal_exactly_where_states_are(name):
  hash_of, state_of, visits = {}, {}, 0
  for index in range(4):
    for env, _ in walk(name, index, num_steps=150):
      key = repr(env.game[0] if name == 'household' else env.game[1]), env.game[-1]
      assert hash_of.setdefault(key, env.state_hash()) == env.state_hash()
      assert state_of.setdefault(env.state_hash(), key) == key
      visits += 1
  assert 20 < len(hash_of) < visits  # many states, and some of them twice


@every_stand_in
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_step_is_total(name, data):
  env, observation = begin(name, data.draw(st.integers(0, 5)))
  pieces = st.sampled_from([*observation.admissible, 'put', 'click[', ']', ' ', 'search['])
  action = data.draw(st.one_of(st.text(), st.lists(pieces).map(''.join), pieces))
  before = env.state_hash()
  result = env.step(action)
  assert isinstance(result.observation.text, str) and 0 <= result.progress <= 1
  if not result.info['valid']:
    assert env.state_hash() == before and result.reward == 0 and not result.done


@every_stand_in
def test_tool_calls_and_steps_after_the_end_change_nothing(name):
  env, _ = begin(name)
  before = env.state_hash()
  result = env.step((types.ToolCall('1', 'search', {}),))
  assert not result.info['valid'] and env.state_hash() == before
  for action in env.expert():
    env.step(action)
  before = env.state_hash()
  result = env.step('look' if name == 'household' else 'search[mug]')
  assert result.done and result.reward == 0.0 and env.state_hash() == before


@every_stand_in
def test_splits_share_no_goal(name):
  def goals(split):
    tasks = [STAND_INS[name][0].make(split, i, difficulty=d) for d in (1, 2, 3) for i in range(150)]
    if name == 'household':
      return {tuple(t.args['goal']) for t in tasks}
    return {tuple(t.args['goal']['attributes']) for t in tasks}

  train, heldout = goals('train'), goals('heldout')
  assert min(len(train), len(heldout)) > 50 and not train & heldout


@every_stand_in
def test_make_is_a_function_of_its_address(name):
  module = STAND_INS[name][0]
  addresses = itertools.product(('train', 'heldout'), (0, 6), (1, 2))
  tasks = [module.make(split, i, difficulty=d) for split, i, d in addresses]
  assert len({t.uid for t in tasks}) == len({repr(t.args) for t in tasks}) == len(tasks)
  assert module.make('train', 3) == module.make('train', 3)
  for bad in (('test', 0, 1), ('train', 0, 4)):
    with pytest.raises(ValueError, match=f'{bad[0]!r}, {bad[2]}'):
      module.make(bad[0], bad[1], difficulty=bad[2])


def room(goal, *things, receptacles=('desk 1', 'fridge 1', 'microwave 1', 'shelf 1', 'shelf 2')):
  args = {'goal': goal, 'things': things, 'receptacles': receptacles}
  env = household.HouseholdEnv()
  env.reset(api.Task('by hand', args), 0)
  return env


def play(env, *actions):
  results = [env.step(action) for action in actions]
  assert all(r.info['valid'] for r in results), [r.observation.text for r in results]
  return results[-1]


def test_progress_by_hand():
  env = room(['heat', 'egg', 'shelf'], ['egg 1', 'desk 1'], ['mug 1', 'desk 1'])
  assert play(env, 'go to desk 1', 'take egg 1 from desk 1').progress == pytest.approx(1 / 3)
  assert play(env, 'go to shelf 1', 'put egg 1 in/on shelf 1').progress == 0  # cold, so nothing yet
  play(env, 'take egg 1 from shelf 1', 'go to microwave 1')
  assert play(env, 'heat egg 1 with microwave 1').progress == pytest.approx(2 / 3)
  result = play(env, 'go to shelf 2', 'put egg 1 in/on shelf 2')
  assert (result.progress, result.reward, result.done) == (1.0, 1.0, True)


def test_two_things_must_be_in_one_place():
  env = room(['two', 'pen', 'shelf'], ['pen 1', 'desk 1'], ['pen 2', 'desk 1'])
  play(env, 'go to desk 1', 'take pen 1 from desk 1', 'go to shelf 1', 'put pen 1 in/on shelf 1')
  play(env, 'go to desk 1', 'take pen 2 from desk 1', 'go to shelf 2')
  assert play(env, 'put pen 2 in/on shelf 2').progress == 0.5
  play(env, 'take pen 2 from shelf 2', 'go to shelf 1')
  assert play(env, 'put pen 2 in/on shelf 1').done


def test_lamp_lights_only_what_is_held_beside_it():
  env = room(['look', 'book', 'desklamp'], ['desklamp 1', 'desk 1'], ['book 1', 'shelf 1'])
  assert play(env, 'go to desk 1', 'use desklamp 1').progress == 0.5
  assert play(env, 'go to shelf 1', 'take book 1 from shelf 1').progress == 0.5
  assert play(env, 'go to desk 1').done


def test_heat_and_cold_undo_each_other_and_leave_clean():
  env = room(
    ['place', 'pen', 'shelf'], ['mug 1', 'sinkbasin 1'],
    receptacles=('sinkbasin 1', 'fridge 1', 'microwave 1', 'shelf 1'),
  )  # fmt: skip
  play(env, 'go to sinkbasin 1', 'take mug 1 from sinkbasin 1', 'clean mug 1 with sinkbasin 1')
  play(env, 'go to microwave 1', 'heat mug 1 with microwave 1')
  assert play(env, 'examine mug 1').observation.text == 'The mug 1 is clean and hot.'
  play(env, 'go to fridge 1', 'cool mug 1 with fridge 1')
  assert play(env, 'examine mug 1').observation.text == 'The mug 1 is clean and cold.'


def test_the_hand_holds_one_thing():
  env = room(['place', 'egg', 'shelf'], ['egg 1', 'desk 1'], ['pen 1', 'desk 1'])
  play(env, 'go to desk 1', 'take pen 1 from desk 1')
  assert not env.step('take egg 1 from desk 1').info['valid']
  play(env, 'put pen 1 in/on desk 1', 'take egg 1 from desk 1')


def test_what_is_closed_hides_its_contents():
  env = room(['place', 'egg', 'shelf'], ['egg 1', 'fridge 1'])
  assert 'egg' not in play(env, 'go to fridge 1').observation.text
  assert not env.step('take egg 1 from fridge 1').info['valid']
  assert 'egg 1' in play(env, 'open fridge 1').observation.text
  assert 'egg 1' in play(env, 'take egg 1 from fridge 1', 'inventory').observation.text
  play(env, 'close fridge 1')
  assert not env.step('put egg 1 in/on fridge 1').info['valid']


def test_nothing_works_but_what_is_admissible():
  """Every verb with every name, from the first states of a walk."""
  for env, observation in walk('household', 3, num_steps=12):
    world, state = env.game
    names = [*world.receptacles[:6], *(t.name for t in state.things[:6])]
    tries = [f'{verb} {a}' for verb in ('go to', 'open', 'close', 'use', 'examine') for a in names]
    for a in names:
      for b in names:
        tries += [f'take {a} from {b}', f'put {a} in/on {b}']
        tries += [f'{verb} {a} with {b}' for verb in ('heat', 'cool', 'clean')]
    worked = {t for t in tries if household.step(world, state, t)[2]}
    assert worked == set(tries) & set(observation.admissible)


def test_equal_states_by_other_ways_are_equal():
  there = ('go to fridge 1', 'open fridge 1', 'go to microwave 1', 'open microwave 1')
  back = ('go to microwave 1', 'open microwave 1', 'go to fridge 1', 'open fridge 1')
  envs = [room(['place', 'egg', 'shelf'], ['egg 1', 'desk 1']) for _ in range(2)]
  play(envs[0], *there, 'go to desk 1')
  play(envs[1], *back, 'go to desk 1')
  assert envs[0].state_hash() == envs[1].state_hash()


def test_difficulty_adds_things_and_hides_them():
  sizes = []
  for difficulty in (1, 2, 3):
    tasks = [household.make('train', i, difficulty=difficulty) for i in range(12)]
    places = [household.kind_of(place) for t in tasks for _, place in t.args['things']]
    hidden = sum(place in household.OPENABLE for place in places)
    assert (hidden > 0) == (difficulty > 1)
    sizes.append(len(places))
  assert sizes == sorted(set(sizes))
