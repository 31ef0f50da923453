"""Copies by replay: equal where the environment is deterministic, an error where it is not."""

import itertools

import pytest

from zppo_jax.envs import api, household, replayed

TASK = household.make('train', 1)


def played(num_actions):
  """Actions of the expert, the recorded texts, and the environment behind them."""
  env = household.HouseholdEnv()
  texts = [env.reset(TASK, 0).text]
  actions = env.expert()[:num_actions]
  texts += [env.step(action).observation.text for action in actions]
  return actions, texts, env


class Fickle:
  """Says something else in each copy, from step `onset` on."""

  def __init__(self, numbers, onset):
    self.number, self.onset, self.steps, self.closed = next(numbers), onset, 0, 0

  def reset(self, task, seed):
    return api.Observation(f'{self.number if self.onset == 0 else ""}')

  def step(self, action):
    self.steps += 1
    text = f'{self.number if self.steps >= self.onset else ""}'
    return api.StepResult(api.Observation(text), 0.0, False)

  def close(self):
    self.closed += 1


@pytest.mark.parametrize('num_actions', (0, 1, 3))
def test_replay_reaches_the_same_state(num_actions):
  actions, texts, env = played(num_actions)
  again = replayed.replay(household.HouseholdEnv, TASK, 0, actions, texts=texts)
  assert again is not env and again.state_hash() == env.state_hash()
  unchecked = replayed.replay(household.HouseholdEnv, TASK, 0, actions)
  assert unchecked.state_hash() == env.state_hash()


@pytest.mark.parametrize(('onset', 'where'), ((0, 'the reset'), (1, 'action 1'), (2, 'action 2')))
def test_a_difference_is_named_and_the_environment_closed(onset, where):
  made = []

  def factory(numbers=itertools.count()):  # noqa: B008 - one counter for all copies
    made.append(Fickle(numbers, onset))
    return made[-1]

  env = replayed.ReplayedEnv(factory)
  env.reset(TASK, 0)
  for action in ('a', 'b', 'c'):
    env.step(action)
  with pytest.raises(replayed.ReplayError, match=f"after {where} it was '.*', now it is '.+'"):
    env.clone()
  assert [m.closed for m in made] == [0, 1]


def test_number_of_texts_is_checked():
  actions, texts, _ = played(2)
  with pytest.raises(ValueError, match='texts must be 3, one more than actions, got 2'):
    replayed.replay(household.HouseholdEnv, TASK, 0, actions, texts=texts[:-1])


def test_clone_and_original_go_their_own_ways():
  env = replayed.ReplayedEnv(household.HouseholdEnv)
  before_reset = env.clone()
  env.reset(TASK, 0)
  actions, texts, direct = played(99)
  for action in actions[:2]:
    env.step(action)
  twin = env.clone()
  assert [env.step(a) for a in actions[2:]] == [twin.step(a) for a in actions[2:]]
  grandchild = twin.clone()
  assert grandchild.step('look') == twin.step('look') == direct.step('look')
  assert before_reset.reset(TASK, 0).text == texts[0]
  env.reset(household.make('train', 2), 0)  # a new episode forgets the old actions
  assert env.clone().step('look') == env.step('look') != twin.step('look')
