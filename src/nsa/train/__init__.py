"""Train a ``LanguageModel`` on text: corpus, batches, the loop, its metrics and its checkpoints."""

from nsa.train.checkpoint import Checkpoint, load_checkpoint
from nsa.train.config import TrainConfig
from nsa.train.corpus import Corpus, read_corpus
from nsa.train.loop import Run, resume_run, start_run, train

__all__ = ["Checkpoint", "Corpus", "Run", "TrainConfig", "load_checkpoint", "read_corpus", "resume_run", "start_run", "train"]
