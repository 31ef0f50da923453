"""Adapters to other packages: what can be checked by hand, and real episodes where they are."""

import shutil

import numpy as np
import pytest

from zppo_jax.core import errors
from zppo_jax.envs import adapters, replayed
from zppo_jax.envs.adapters import babyai, scienceworld, textworld

LEVELS = (
  'BabyAI-GoToObj-v0', 'BabyAI-GoToLocal-v0', 'BabyAI-PickupLoc-v0', 'BabyAI-PutNextLocal-v0',
  'BabyAI-OpenDoor-v0', 'BabyAI-UnlockLocal-v0',
)  # fmt: skip


def view(*cells):
  """An empty view with (x, y, object, colour, state) in it."""
  image = np.zeros((7, 7, 3), np.uint8)
  image[:, :, 0] = babyai.OBJECTS.index('empty')
  for x, y, kind, color, state in cells:
    image[x, y] = babyai.OBJECTS.index(kind), babyai.COLORS.index(color), state
  return image.tolist()


@pytest.mark.parametrize(
  ('cells', 'expected'),
  [
    ([], 'You see nothing.'),
    ([(2, 4, 'ball', 'red', 0)], 'You see a red ball 2 steps forward, 1 step left.'),
    ([(6, 6, 'key', 'grey', 0)], 'You see a grey key 3 steps right.'),
    (
      [(3, 2, 'door', 'blue', 2), (3, 5, 'door', 'green', 0)],
      'You see an open green door 1 step forward; a locked blue door 4 steps forward.',
    ),
    (
      [(3, 4, 'wall', 'grey', 0), (3, 1, 'wall', 'grey', 0), (1, 6, 'wall', 'grey', 0)],
      'You see a wall 2 steps forward; a wall 2 steps left.',
    ),
    ([(3, 6, 'box', 'purple', 0)], 'You see nothing. You carry a purple box.'),
    ([(3, 0, 'unseen', 'red', 0)], 'You see nothing.'),
  ],
)
def test_view_in_words(cells, expected):
  assert babyai.describe(view(*cells)) == expected


def test_a_missing_package_names_its_extra():
  with pytest.raises(errors.UserError, match=r"module is missing: .* 'zppo_jax\[envs-x\]'"):
    adapters.require('no_such.module', 'envs-x')


def test_a_broken_package_is_not_called_missing(tmp_path, monkeypatch):
  (tmp_path / 'half_there.py').write_text('import not_there_at_all')
  monkeypatch.syspath_prepend(tmp_path)
  with pytest.raises(ModuleNotFoundError, match='not_there_at_all'):
    adapters.require('half_there', 'envs-x')


def finish(env, task):
  """Plays the expert's actions until the end; the results."""
  env.reset(task, 0)
  results = []
  for action in env.expert():
    results.append(env.step(action))
    assert results[-1].info['valid'], action
    if results[-1].done:
      break
  return results


def test_babyai_knows_minigrids_numbers():
  pytest.importorskip('minigrid')
  from minigrid.core import actions, constants

  for ours, theirs in (
    (babyai.OBJECTS, constants.OBJECT_TO_IDX),
    (babyai.COLORS, constants.COLOR_TO_IDX),
    (babyai.DOORS, constants.STATE_TO_IDX),
    (babyai.ACTIONS, {a.name: a.value for a in actions.Actions}),
  ):
    assert dict(zip(ours, range(len(ours)))) == theirs


@pytest.mark.parametrize('level', LEVELS)
def test_babyai_bot_wins(level):
  pytest.importorskip('minigrid')
  for seed in range(5):
    env = babyai.BabyAIEnv()
    results = finish(env, babyai.make(level, seed))
    limit = env._env.unwrapped.max_steps
    assert results[-1].done and results[-1].reward == pytest.approx(1 - 0.9 * len(results) / limit)
    assert not any(r.reward for r in results[:-1])
    assert env.step('forward').info == {'valid': False}
    env.close()


def test_babyai_says_what_it_sees_and_carries():
  pytest.importorskip('minigrid')
  env = babyai.BabyAIEnv()
  task = babyai.make('BabyAI-PickupLoc-v0', 1)
  first = env.reset(task, 0)
  mission = env._env.unwrapped.mission
  assert first.text.startswith(f'Your task: {mission}.\nYou see ')
  assert first.admissible == babyai.ACTIONS
  plan = env.expert()
  assert plan[-1] == 'pickup' and 'You carry' not in first.text
  for action in plan[:-1]:
    before = env.step(action).observation.text
  after = env.step('pickup').observation.text
  carried = after.partition('You carry ')[2].rstrip('.')
  assert carried.split()[-1] in mission and f'{carried} 1 step forward' in before


def test_babyai_is_total_deterministic_and_copies_itself():
  pytest.importorskip('minigrid')
  task = babyai.make('BabyAI-GoToLocal-v0', 3)
  texts = []
  for _ in range(2):
    env = babyai.BabyAIEnv()
    said = [env.reset(task, 0).text]
    said += [env.step(a).observation.text for a in ('left', 'forward', '', 'jump', ' Right ')]
    texts.append(said)
  assert texts[0] == texts[1] and texts[0][3].startswith('Nothing happens.')
  twin = env.clone()
  here = env.step('toggle').observation
  for action in ('left', 'forward', 'forward'):
    twin.step(action)
  assert env.step('toggle').observation == here != twin.step('toggle').observation
  plan = twin.expert()
  assert [twin.step(a) for a in plan][-1].reward > 0


def test_textworld_game_is_won_and_replayed(tmp_path):
  package = pytest.importorskip('textworld')
  options = package.GameOptions()
  options.seeds, options.nb_rooms, options.nb_objects, options.quest_length = 7, 2, 4, 2
  options.path = str(tmp_path / 'game.z8')
  path, _ = package.make(options)
  task = textworld.make(path)
  env = textworld.TextWorldEnv()
  results = finish(env, task)
  assert results[-1].done and results[-1].info['won'] and results[-1].progress == 1.0
  assert sum(r.reward for r in results) == 1.0
  assert env.step('look').done
  env.close()
  copy_of = replayed.ReplayedEnv(textworld.TextWorldEnv)
  first = copy_of.reset(task, 0)
  assert first.text.startswith(copy_of._env._state.objective)  # no banner before it
  assert '-=' not in first.text.splitlines()[-1] and first.text.count('>') == 0
  for action in ('quit', 'Look. Save', '\x00', 'xyzzy', 'look\x00é', first.admissible[0]):
    result = copy_of.step(action)
    assert not result.done and result.info['valid'] == (
      action not in ('quit', 'Look. Save', '\x00')
    )
  twin = copy_of.clone()
  assert twin.step('inventory').observation == copy_of.step('inventory').observation
  for each in (twin, copy_of):
    each.close()


@pytest.mark.parametrize(
  ('action', 'expected'),
  [
    (' go\x00\n north ', 'go north'),
    ('take the script', 'take the script'),
    ('QUIT', ''),
    ('look then undo', ''),
    ('look. save', ''),
    ('', ''),
    ((), ''),
  ],
)
def test_textworld_hears_only_what_is_for_the_game(action, expected):
  assert textworld.command(action) == expected


def test_textworld_text_is_tidied():
  assert textworld.tidy('\nYou look.\n\n>      -= Hall =-0/2') == 'You look.'
  assert textworld.tidy('\nBye. ') == 'Bye.'


def test_scienceworld_task_is_solved():
  pytest.importorskip('scienceworld')
  if shutil.which('java') is None:
    pytest.skip('no Java')
  env = scienceworld.ScienceWorldEnv()
  task = scienceworld.make('find-living-thing', 0)
  first = env.reset(task, 0)
  assert first.text.startswith('Task Description') and len(first.admissible) > 20
  start = [env.step(a).observation.text for a in ('look around', 'inventory')]
  assert not env.step('').info['valid'] and not env.step('xyzzy').info['valid']
  env.reset(task, 0)
  assert [env.step(a).observation.text for a in ('look around', 'inventory')] == start
  env.reset(task, 0)
  results = []
  for action in env.expert():
    results.append(env.step(action))
    if results[-1].done:
      break
  assert results[-1].done and results[-1].progress == 1.0
  assert sum(r.reward for r in results) == pytest.approx(1.0)
  env.close()
