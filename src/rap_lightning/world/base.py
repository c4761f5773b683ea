"""The base model of the small world: a tokenizer and a tiny chat model, trained on the spot.

The base speaks the world (topics, orders, counts), has seen the goal message and has a faint idea of it, for its
training goals were noisy. Steering well is left to preference training.
"""

import itertools
from collections.abc import Iterable

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rap_lightning.world.data import Example, Message

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


def train_tokenizer(texts: Iterable[str], vocab_size: int = 640) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with the ChatML template, its merges learnt from `texts`.

    Every digit is a token of its own, so that "7.5" and "10" are read as numbers and not as words that happen to occur.
    Words are not kept apart: what always comes together, as most of the goal message does, becomes one token, and
    sequences get short. So pass words that are to stay apart as texts of their own, each with the space before it.

    Args:
        texts: what the merges are learnt from, each as often as it is to count.
        vocab_size: upper bound of the number of tokens, the 256 bytes and 3 special tokens included.
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
            vocab_size=vocab_size,
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


def new_model(tokenizer: PreTrainedTokenizerFast, *, width: int = 96, layers: int = 3, seed: int = 0) -> LlamaForCausalLM:
    """An untrained Llama, as small as it may be: `12 * layers * width**2` weights, and `width` for each token.

    Args:
        tokenizer: its number of tokens, end of turn and padding go into the configuration.
        width: of the hidden states; a multiple of 32, the width of a head.
        layers: number of layers.
        seed: of the first weights.

    Raises:
        ValueError: `width` is not a multiple of 32.
    """
    if width % 32:
        raise ValueError(f"width must be a multiple of 32; got {width}")
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=8 * width // 3,
            num_hidden_layers=layers,
            num_attention_heads=width // int(__import__("os").environ.get("HD","32")),
            max_position_embeddings=MAX_LENGTH,
            tie_word_embeddings=True,
            initializer_range=width**-0.5,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
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
    examples: Iterable[Example],
    *,
    steps: int,
    batch_size: int = 64,
    learning_rate: float = 4e-3,
) -> float:
    """Train `model` in place on the responses of `examples`, end of turn included; prompts carry no loss.

    The learning rate rises over the first twentieth of the steps and then falls to 0 in a straight line.

    Args:
        model: from `new_model`, on the CPU or elsewhere.
        tokenizer: from `train_tokenizer`.
        examples: at least `steps * batch_size` of them; no more than that are taken.
        steps: optimizer steps.
        batch_size: examples in a step.
        learning_rate: at its highest.

    Returns:
        The mean loss over the last tenth of the steps, in nats for a response token.

    Raises:
        ValueError: there are too few examples.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
    )
    source = iter(examples)
    losses: list[float] = []
    model.train()
    for _ in (bar := tqdm(range(steps), desc="base model", unit="step")):
        batch = [example["messages"] for example in itertools.islice(source, batch_size)]
        if len(batch) < batch_size:
            raise ValueError(f"{steps} steps of {batch_size} examples need {steps * batch_size} examples; they ran out")
        loss = _response_loss(model, *_encode(batch, tokenizer))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.2f}", refresh=False)
    model.eval()
    last = losses[-max(1, steps // 10) :]
    return sum(last) / len(last)


def _encode(batch: list[list[Message]], tokenizer: PreTrainedTokenizerFast) -> tuple[Tensor, Tensor]:
    """Ids `[B, T]`, padded on the right, and where a response token stands `[B, T]`."""
    prompts = [tokenizer.apply_chat_template(m[:-1], tokenize=False, add_generation_prompt=True) for m in batch]
    texts = [prompt + messages[-1]["content"] + END for prompt, messages in zip(prompts, batch, strict=True)]
    ids = [torch.tensor(row) for row in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    starts = torch.tensor([len(row) for row in tokenizer(prompts, add_special_tokens=False)["input_ids"]])
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=int(tokenizer.pad_token_id))
    place = torch.arange(padded.shape[1])
    ends = torch.tensor([len(row) for row in ids])
    return padded, (place >= starts[:, None]) & (place < ends[:, None])


def _response_loss(model: LlamaForCausalLM, ids: Tensor, response: Tensor) -> Tensor:
    # Padding is on the right and attention causal: no response token sees any, so no mask is needed. Only hidden
    # states that predict a response token meet the vocabulary.
    ids, response = ids.to(model.device), response.to(model.device)
    hidden = model.model(input_ids=ids[:, :-1]).last_hidden_state
    wanted = response[:, 1:]
    return cross_entropy(model.lm_head(hidden[wanted]), ids[:, 1:][wanted])
