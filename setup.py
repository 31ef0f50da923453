"""Package metadata. Heavy or rarely needed libraries are extras and imported lazily."""

from setuptools import find_packages, setup

TEST = ['pytest>=8', 'pytest-xdist>=3.5', 'hypothesis>=6.100', 'rlax>=0.1.6', 'ruff>=0.6',
        'httpx>=0.27']

setup(
  name='zppo_jax',
  version='0.1.0',
  description='Post-training in JAX: a small student, a stronger teacher, one design.',
  python_requires='>=3.11',
  packages=find_packages(include=['zppo_jax*', 'kernels*', 'experiments*',
                                  'ml_collections_configs*']),
  package_data={'zppo_jax': ['data/**/*.json', 'data/**/*.model', 'data/**/*.txt']},
  install_requires=[
    'absl-py>=2.1',
    'chex>=0.1.90',
    'etils[epath]>=1.9',
    'grain>=0.2.12',
    'importlib_resources>=6.0',  # tensorflow-datasets needs it without saying so
    'jax>=0.10.2',
    'jinja2>=3.1',
    'array_record>=0.8',
    'math-verify[antlr4_13_2]>=0.8',
    'matplotlib>=3.8',
    'ml_collections>=1.0',
    'numpy>=1.26',
    'optax>=0.2.5',
    'orbax-checkpoint>=0.11.20',
    'pyarrow>=15',
    'reasoning-gym>=0.1.19',
    'scipy>=1.11',
    'sentencepiece>=0.2.0',
    'tensorflow-datasets>=4.9.7',
    'tokenizers>=0.20',
    'tqdm>=4.66',
  ],
  extras_require={
    'tpu': ['jax[tpu]>=0.10.2'],
    'gpu': ['jax[cuda13]>=0.10.2'],
    'hf': ['safetensors>=0.4'],
    'http': ['httpx>=0.27'],
    'eval': ['lm-eval>=0.4.13'],
    'aot': ['libtpu>=0.0.20'],
    'log': ['tensorboardX>=2.6'],
    'envs-grid': ['minigrid>=3.0', 'gymnasium>=1.0'],
    'envs-text': ['textworld>=1.6'],
    'envs-science': ['scienceworld>=1.2'],
    'notebooks': ['jupytext>=1.16', 'nbmake>=1.5', 'ipykernel>=6.29'],
    'test': TEST + ['libtpu>=0.0.20', 'tensorboardX>=2.6'],
  },
)
