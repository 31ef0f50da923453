"""What every config shares. A preset is one of 'tiny' (2 CPU cores), 'local' (one accelerator),
'pod'.

Method fields are placeholders: None keeps the value of the method's own row, which is its
published setting.
"""

from ml_collections import config_dict

PRESETS = ('tiny', 'local', 'pod')
INSTRUCTION = ('Think step by step inside <think> and </think>, then give the final answer inside '
               '\\boxed{}.')

# Published shapes are presets; vocab 0 = from the tokenizer.
MODELS = {
  'tiny': dict(hidden=96, layers=2, heads=4, kv_heads=2, head_dim=24, inter=192, rope_theta=1e4,
               unroll=2, vocab_multiple=8),
  '0.6b': dict(preset='qwen3-0.6b'),
  '2b': dict(preset='qwen3.5-2b'),
  '27b': dict(preset='qwen3.5-27b'),
}


def preset_name(arg):
  """'' and None mean the published scale."""
  name = arg or 'pod'
  if name not in PRESETS:
    raise ValueError(f'preset {name!r} is not one of {PRESETS}')
  return name


def model(name, **changes):
  """A model section by size name."""
  fields = dict(preset='', vocab=0, vocab_multiple=128, qk_norm=True, rope_theta=1e6,
                norm_eps=1e-6, tied=True,
                dtype='float32', param_dtype='float32', remat='none', unroll=1, query_chunk=1024,
                mixers=('full',), context=32_768, linear_heads=0, linear_value_heads=0,
                linear_key_dim=0, linear_value_dim=0, linear_conv=4, linear_rank=0,
                linear_negative=False, linear_kernel='', attn_kernel='')
  return config_dict.ConfigDict(fields | MODELS[name] | changes)


def fields(**types):
  """Method fields that are None unless set: the row of the method decides."""
  return {name: config_dict.placeholder(kind) for name, kind in types.items()}


def arithmetic_tasks():
  """Embedded verifiable questions: sums, modular maths, and third-party arithmetic in words."""
  return dict(
    sums=dict(name='arithmetic', digits=1, terms=3, operators='+-', tool=False, weight=1.0),
    modular=dict(name='modmath', weight=1.0),
    calculate=dict(name='reasoning_gym', dataset='basic_arithmetic', weight=1.0,
                   config=dict(min_terms=3, max_terms=3, min_digits=1, max_digits=1,
                               allow_parentheses=False, operators=('+', '-'))))


def base(preset):
  """All sections at the size of a preset; `method` is for each config file to fill in."""
  tiny = preset == 'tiny'
  c = config_dict.ConfigDict()
  c.seed = 0
  c.num_steps = 60 if tiny else 200
  c.max_staleness = 0
  c.allow_uncorrected_staleness = False
  c.method = config_dict.ConfigDict(dict(name='grpo'))
  c.model = model('tiny') if tiny else model(
    '2b' if preset == 'pod' else '0.6b', dtype='bfloat16', param_dtype='float32', remat='full')
  c.init = dict(checkpoint='')
  c.lora = dict(rank=0, alpha=32.0, targets=())  # rank 0 trains all parameters
  c.teacher = dict(checkpoint='', model=model('tiny') if tiny else model(
    '27b', dtype='bfloat16', param_dtype='bfloat16'))
  c.tokenizer = dict(kind='auto', path='', pieces=('\\boxed{',))
  c.data = dict(
    path='', schema='auto', on_bad_row='error', heldout_percent=10, tasks=arithmetic_tasks(),
    size=20_000, eval_size=512, template='auto' if tiny else 'chatml',
    instruction='' if tiny else INSTRUCTION, deadline_secs=5.0, allow_fractional=False)
  c.rollout = dict(
    prompt_tokens=32 if tiny else 4096, reformulated_tokens=184 if tiny else 12_288,
    max_new_tokens=40 if tiny else 12_288, temperature=1.0, write_prompt_tokens=0 if tiny else
    16_384, write_chunk=64, chunk_groups=120 if preset == 'pod' else 0,
    slots=0,  # rows in flight, refilled as they end; 0 = all rows of a call until the last one ends
    # Keys that a token is drawn by (AsyncTLS), chosen among top_blocks blocks; 0 = all. Scores are
    # by all keys, so it wants method.correction, or uncorrected=True.
    sparse=dict(top_tokens=0, top_blocks=128, block=64, sink_blocks=1, stale=False, labels=32,
                # Blocks on the device of every row and head, the other keys in host memory; how
                # many come in at a step. 0 = all keys stay on the device.
                pool=0, misses=8, uncorrected=False))
  # Tools make a rollout an episode: answers, tool answers (not trained on), answers; then
  # rollout.max_new_tokens is the room for all of it. '{tools}' describes them to the policy.
  c.agent = dict(tools=(), parser='xml_tags' if tiny else 'hermes',
                 system='' if tiny else '{tools}',
                 max_turns=4, turn_tokens=0,  # most answers; tokens of each, 0 = all left
                 env='', env_args=dict())  # household, shop or babyai: its tasks instead of data
  c.optim = dict(learning_rate=3e-4 if tiny else 1e-6,
                 critic_learning_rate=1e-3 if tiny else 1e-5,
                 warmup_steps=0, decay_steps=0, beta1=0.9, beta2=0.999, eps=1e-8,
                 weight_decay=0.1, clip_norm=1.0)
  c.train = dict(micro_batches=1, chunk=4096, share_prompts=True)
  c.mesh = dict(data=1, fsdp=-1, expert=1, context=1, tensor=1)
  if preset == 'pod':  # 64 chips; chunk counts positions of the response, for all rows at once
    c.train = dict(micro_batches=12, chunk=256, share_prompts=False)  # groups span chips
    c.mesh.tensor = 4
  c.eval = dict(every_steps=0 if tiny else 20, num_questions=256 if tiny else 512, chunk=128,
                samples=1, temperature=1.0 if tiny else 0.6, top_k=0 if tiny else 20,
                top_p=1.0 if tiny else 0.95, min_p=0.0)
  c.log = dict(every_steps=1, dump_every_steps=10, dump_rows=16, tensorboard=False, progress=True,
               profile_start=-1, profile_steps=3,
               phase_limit_s=0.0 if tiny else 7200.0)  # ends a run that hangs; 0 = never
  c.ckpt = dict(every_steps=10, keep=2, export=True)
  c.launch = dict(compilation_cache='')
  return c
