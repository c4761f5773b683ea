"""The base model of the embedded world: a tokenizer and a tiny chat model, trained on the spot.

The base model knows topics, orders and counts, and follows the goal message weakly, because its training goals were
noisy. Following goals well is left to preference training.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rap_lightning.preferences.pairs import Message
from rap_lightning.progress_bar import progress

PAD, START, END = "<|pad|>", "<|im_start|>", "<|im_end|>"
#: ChatML, without a system message of its own.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
#: The longest sequence the model takes, in tokens.
MAX_LENGTH = 256


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with the ChatML template.

    Every digit is a token, so that "7.5" is read as a number. So is "10": as "1", "0" the highest goal would look like
    the lowest. Merges cross words: text that always occurs together, like most of the goal message, becomes one token,
    which keeps sequences short. Words that must stay separate are passed as separate texts, with their leading space.
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?10(?!\d)| ?\d| ?[^\w\s]|\n"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=720,  # at most; the 256 bytes and 3 special tokens included
            special_tokens=[PAD, START, END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens=[START],
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def new_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """Return an untrained, tiny Llama of two layers.

    The embeddings of the numbers 0 to 10 start on a line, so that what is learned of one goal transfers to its
    neighbours. Otherwise a model of this size needs several times the steps before it follows goals at all.
    """
    width = 64
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=8 * width // 3,
            num_hidden_layers=2,
            num_attention_heads=width // 32,
            max_position_embeddings=MAX_LENGTH,
            tie_word_embeddings=True,
            initializer_range=width**-0.5,  # the usual 0.02 suits wide models; a narrow one would start too slowly
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        direction = torch.randn(width) * width**-0.5
        for number, form in itertools.product(range(11), ("{}", " {}")):
            for token in tokenizer.encode(form.format(number), add_special_tokens=False):
                embedding[token] = embedding[token] / 2 + direction * (number - 5.5) / 3
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        max_new_tokens=48,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


def train_base(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    examples: Iterable[list[Message]],
    *,
    steps: int,
    batch_size: int,
) -> float:
    """Train `model` in place on the responses of `examples`, end of turn included; prompts have no loss.

    The learning rate warms up over the first 5% of the steps and then decays linearly to 0. Training uses one thread:
    matrices this small gain little from a second one, threads of a busy machine wait for each other far longer than
    they work, and so the result does not depend on the number of cores.

    Args:
        examples: at least `(steps + 1) * batch_size`, because a batch holds one kind, with or without a goal.

    Returns:
        The mean loss over the last 10% of the steps, in nats per response token.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3, betas=(0.9, 0.98), weight_decay=0.01)
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
    )
    losses: list[float] = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model.train()
    try:
        batches = itertools.islice(_batches(examples, batch_size), steps)
        for batch in (bar := progress(batches, total=steps, desc="base model", unit="step", mininterval=1)):
            loss = _response_loss(model, *_encode(batch, tokenizer))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            bar.set_postfix(loss=f"{losses[-1]:.2f}", refresh=False)
    finally:
        torch.set_num_threads(threads)
    model.eval()
    last = losses[-max(1, steps // 10) :]
    return sum(last) / len(last)


def sampler(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int) -> Callable[[list[str]], list[str]]:
    """Return a function that samples a response to each prompt, without a goal, by the model's generation config.

    Each call uses the seed, and restores the global random state.
    """
    batch_size = 256

    def sample(prompts: list[str]) -> list[str]:
        turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
        texts = [tokenizer.apply_chat_template(t, tokenize=False, add_generation_prompt=True) for t in turns]
        found: list[str] = []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for first in range(0, len(texts), batch_size):
                part = tokenizer(
                    texts[first : first + batch_size],
                    add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt",
                )  # fmt: skip
                output = model.generate(input_ids=part["input_ids"], attention_mask=part["attention_mask"])
                found += tokenizer.batch_decode(output[:, part["input_ids"].shape[1] :], skip_special_tokens=True)
        return [text.strip() for text in found]

    return sample


def _batches(examples: Iterable[list[Message]], size: int) -> Iterator[list[list[Message]]]:
    # Examples with a goal are twice as long as those without. A batch holds one kind, so it has little padding.
    waiting: dict[int, list[list[Message]]] = {}
    for turns in examples:
        batch = waiting.setdefault(len(turns), [])
        batch.append(turns)
        if len(batch) == size:
            yield waiting.pop(len(turns))


def _encode(batch: list[list[Message]], tokenizer: PreTrainedTokenizerFast) -> tuple[Tensor, Tensor]:
    """Return right-padded ids `[B, T]`, and a mask of the response tokens `[B, T]`."""
    prompts = [tokenizer.apply_chat_template(m[:-1], tokenize=False, add_generation_prompt=True) for m in batch]
    texts = [prompt + messages[-1]["content"] + END for prompt, messages in zip(prompts, batch, strict=True)]
    ids = [torch.tensor(row) for row in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    starts = torch.tensor([len(row) for row in tokenizer(prompts, add_special_tokens=False)["input_ids"]])
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=int(tokenizer.pad_token_id))
    place = torch.arange(padded.shape[1])
    ends = torch.tensor([len(row) for row in ids])
    return padded, (place >= starts[:, None]) & (place < ends[:, None])


def _response_loss(model: LlamaForCausalLM, ids: Tensor, response: Tensor) -> Tensor:
    # Padding is on the right and attention is causal: no response token attends to padding, so no mask is needed. The
    # head is applied only to the hidden states that predict a response token.
    ids, response = ids.to(model.device), response.to(model.device)
    hidden = model.model(input_ids=ids[:, :-1]).last_hidden_state
    wanted = response[:, 1:]
    return cross_entropy(model.lm_head(hidden[wanted]), ids[:, 1:][wanted])
