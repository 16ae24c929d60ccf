import pytest
import torch

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from support.language import randomised

from rookery.evaluate.lm_eval import RookeryLM
from rookery.models import save_model
from rookery.tokenizers import load_tokenizer

BYTES = load_tokenizer("bytes")


@pytest.fixture(scope="module")
def model():
    model = randomised("rwkv7-test", vocab_size=256)
    return model.eval()


def asked(kind, *args):
    return Instance(request_type=kind, doc={}, arguments=args, idx=0)


@torch.no_grad()
def log_prob(model, context, target):
    logits, _ = model(torch.tensor([[*context, *target]]))
    log_probs = logits[0].float().log_softmax(-1)
    return sum(float(log_probs[len(context) - 1 + i, token]) for i, token in enumerate(target))


def test_likelihoods_are_those_of_the_joined_text(model):
    lm = RookeryLM(model)
    found = lm.loglikelihood([asked("loglikelihood", "a context", " yes"), asked("loglikelihood", "", "no")])
    assert found[0][0] == pytest.approx(log_prob(model, [0, *b"a context"], b" yes"), abs=1e-5)
    assert found[1][0] == pytest.approx(log_prob(model, [0], b"no"), abs=1e-5)


def test_a_rolling_likelihood_is_of_the_whole_text(model):
    """However long it is: no windows, and every token once."""
    text = "the quick brown fox. " * 12
    for budget in (4096, 50):
        (found,) = RookeryLM(model, budget=budget).loglikelihood_rolling([asked("loglikelihood_rolling", text)])
        assert found == pytest.approx(log_prob(model, [0], text.encode()), rel=1e-6)


def test_generation_ends_before_a_stop_string(model):
    lm = RookeryLM(model)
    (whole,) = lm.generate_until([asked("generate_until", "abc", {"until": [], "max_gen_toks": 12})])
    assert 0 < len(whole) <= 12
    stop = whole[3:5]
    (cut,) = lm.generate_until([asked("generate_until", "abc", {"until": stop, "max_gen_toks": 12})])
    assert cut == whole.split(stop)[0]


def test_answers_that_are_written_together_are_those_written_alone(model):
    lm = RookeryLM(model, budget=7)
    options = [{"max_gen_toks": n} for n in (0, 3, 9, 5)]
    requests = [asked("generate_until", text, o) for text, o in zip(("abc", "a longer context", "", "x"), options)]
    together = lm.generate_until(requests)
    assert together == [lm.generate_until([request])[0] for request in requests]
    assert together[0] == ""


def test_sampling_is_refused(model):
    with pytest.raises(ValueError, match="answers greedily"):
        RookeryLM(model).generate_until([asked("generate_until", "a", {"do_sample": True, "temperature": 0.7})])


def test_a_file_is_loaded_with_its_tokenizer(model, tmp_path):
    save_model(model, tmp_path / "m.safetensors", metadata={"tokenizer": "bytes"})
    lm = RookeryLM(str(tmp_path / "m.safetensors"))
    assert lm.tokenizer_name == "bytes"
    (found,) = lm.loglikelihood_rolling([asked("loglikelihood_rolling", "abc")])
    assert found == pytest.approx(log_prob(model, [0], b"abc"), abs=1e-4)
    with pytest.raises(ValueError, match="give pretrained=MODEL"):
        RookeryLM()


@pytest.mark.slow  # the harness imports half of PyPI
def test_a_task_of_the_harness_runs(model):
    """Through the harness itself, on a task that is defined here and needs no download."""
    import lm_eval
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    documents = [{"q": "1+1?", "choices": ["2", "3"], "label": 0}, {"q": "1+2?", "choices": ["2", "3"], "label": 1}]
    task = ConfigurableTask(
        config={
            "task": "tiny",
            "custom_dataset": lambda **_: {"test": Dataset.from_list(documents)},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{q}}",
            "doc_to_choice": "choices",
            "doc_to_target": "label",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        }
    )
    lm = RookeryLM(model)
    found = lm_eval.simple_evaluate(model=lm, tasks=[task], bootstrap_iters=0)
    assert found["results"]["tiny"]["acc,none"] in (0.0, 0.5, 1.0)
    assert lm.scorer.tokens_asked > 0
