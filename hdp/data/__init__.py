"""Documents: real text in, tokens with lengths known up front out.

    documents = hdp.data.open_documents("corpus.jsonl", tokenizer="path/to/tokenizer", max_length=32768)
    train, held_out = documents.split(held_out=0.02, seed=0)
    train.lengths       # numpy int64: all that a planner needs, nothing is read
    train[17]           # 1-D int64 tensor, read from a memory-mapped file

Text is tokenised once, by one process of each machine, into a cache file that all processes map; nothing is ever held
in memory whole.
"""

from hdp.data.documents import Documents, open_documents
from hdp.data.problems import DataError, DataWarning
from hdp.data.tokenizers import ByteTokenizer, load_tokenizer

__all__ = ["ByteTokenizer", "DataError", "DataWarning", "Documents", "load_tokenizer", "open_documents"]
