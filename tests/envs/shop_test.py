"""The shop: rewards and searches by hand. What all stand-ins share is in household_test."""

import itertools

import pytest

from zppo_jax.envs import shop

MUG = shop.Item(
  'b1', 'Birch soft mug', ('mug', 'soft'), (('color', ('blue', 'red')), ('size', ('small',))), 900
)
GOAL = shop.Goal(('mug', 'soft'), (('color', 'red'),), 1000)


def begin(index=0, *, difficulty=2):
  env = shop.ShopEnv()
  env.reset(shop.make('train', index, difficulty=difficulty), 0)
  return env


@pytest.mark.parametrize(
  ('goal', 'chosen', 'expected'),
  [
    (GOAL, {'color': 'red', 'size': 'small'}, 1.0),  # an option nobody asked for does no harm
    (GOAL, {'color': 'blue'}, 3 / 4),
    (shop.Goal(('lamp', 'soft'), (('color', 'red'),), 899), {'color': 'red'}, 2 / 4),
    (shop.Goal(('mug',), (), 900), {}, 1.0),  # the highest price is allowed
  ],
)
def test_reward_by_hand(goal, chosen, expected):
  assert shop.reward(goal, MUG, chosen) == expected


def test_search_counts_words_and_breaks_ties_by_id():
  titles = {'b2': 'soft mug', 'b1': 'quiet mug', 'b3': 'soft heavy-duty mug', 'b4': 'lamp'}
  items = {i: shop.Item(i, title, (), (), 1) for i, title in titles.items()}
  ids_of = {}
  for i, title in titles.items():
    for word in shop.words(title):
      ids_of[word] = (*ids_of.get(word, ()), i)
  shelf = shop.Catalogue(0, items, ids_of)
  assert shop.search(shelf, 'MUG!') == ('b1', 'b2', 'b3')
  assert shop.search(shelf, 'heavy soft mug mug') == ('b3', 'b2', 'b1')
  assert shop.search(shelf, 'sofa') == ()


def test_catalogue_index_finds_every_item_by_its_words():
  shelf = shop.catalogue(0, 60)
  for item in shelf.items.values():
    results = shop.search(shelf, item.title)
    assert item.id in results[:5]
    assert set(shop.words(item.title)) == {w for w, ids in shelf.ids_of.items() if item.id in ids}
  values = list(itertools.chain.from_iterable(shop.OPTIONS.values()))
  assert len(values) == len(set(values)) and not set(shop.CATEGORIES) & set(shop.ATTRIBUTES)


def test_pages_show_all_results_once():
  env = begin()
  result = env.step('search[soft mug]')
  results, seen, number = env.game[2].results, [], 1
  while True:
    seen += [a for a in result.observation.admissible if a.startswith('click[b0')]
    if 'click[next]' not in result.observation.admissible:
      break
    result, number = env.step('click[next]'), number + 1
  assert seen == [f'click[{i}]' for i in results] and number == -(-len(results) // 10) > 2
  assert not env.step('click[next]').info['valid']
  env.step('click[previous]')
  assert env.game[2].page == number - 2


def test_going_back_keeps_the_results_and_forgets_the_choice():
  env = begin()
  listed = env.step('search[mug]').observation
  item = next(a for a in listed.admissible if a.startswith('click[b0'))
  opened = env.step(item).observation
  value = opened.admissible[-1]
  chosen = env.step(value).observation
  assert f'chosen: {value[6:-1]}' in chosen.text and chosen.text != opened.text
  assert env.step('click[back]').observation == listed
  assert env.step(item).observation == opened


def test_second_choice_of_an_option_replaces_the_first():
  env = begin()
  env.step('search[mug]')
  env.step(f'click[{env.game[2].results[0]}]')
  name, values = env.game[0].items[env.game[2].item].options[0]
  for value in values:
    env.step(f'click[{value}]')
  assert env.game[2].chosen == ((name, values[-1]),)


def test_a_wrong_purchase_ends_with_what_it_is_worth():
  env = begin(difficulty=3)
  env.step('search[rug chair]')
  before = env.step(f'click[{env.game[2].results[0]}]')
  result = env.step('buy')
  shelf, goal, state = env.game
  worth = shop.reward(goal, shelf.items[state.item], {})
  assert before.reward == 0 and result.done and result.reward == worth < 1
  assert before.progress < result.progress < 1
  assert result.observation.admissible == ()


@pytest.mark.parametrize('action', ('buy', 'click[next]', 'click[b0]', 'click[red]', 'search[ ]'))
def test_what_the_first_page_does_not_offer_does_not_work(action):
  env = begin()
  result = env.step(action)
  assert not result.info['valid'] and result.observation.text.startswith('Nothing happens.')
