import json

import pytest
import tokenizers

_TEXTS = [f'what is {a}+{b}? the answer is \\boxed{{{a + b}}}' for a in range(40) for b in range(9)]


def _write_hf(folder, *, template=None):
  """A tiny byte-level BPE tokenizer.json with a config beside it."""
  raw = tokenizers.Tokenizer(tokenizers.models.BPE())
  raw.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  raw.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=400,
    special_tokens=['<|endoftext|>', '<|im_start|>', '<|im_end|>'],
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  raw.train_from_iterator(_TEXTS, trainer)
  raw.add_tokens(['<think>', '</think>'])  # added, yet not special: as in Qwen's files
  raw.save(str(folder / 'tokenizer.json'))
  config = {'eos_token': {'content': '<|im_end|>'}, 'pad_token': '<|endoftext|>', 'bos_token': None}
  config |= {'chat_template': template} if template else {}
  (folder / 'tokenizer_config.json').write_text(json.dumps(config))


@pytest.fixture(scope='session')
def write_hf():
  """A function (folder, template=None) that writes a tiny tokenizer.json and its config."""
  return _write_hf
