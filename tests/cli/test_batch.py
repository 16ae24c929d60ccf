import json

from rookery.engine.llm import LLM


def test_texts_of_a_file_go_to_a_file(cli, model_path, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"prompt": "hello"}\n{"prompt": "more", "max_tokens": 3}\n')
    argv = ["batch", tmp_path / "in.jsonl", tmp_path / "out.jsonl", "--model", model_path, "-n", 10, "--seed", 4]
    code, out, err = cli(*argv)
    assert (code, out, err) == (0, "", f"2 texts in {tmp_path / 'out.jsonl'}\n")
    lines = sorted(map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines()), key=lambda line: line["index"])
    llm = LLM(model_path)
    assert [line["text"] for line in lines] == [llm.generate("hello", 10, seed=4), llm.generate("more", 3, seed=5)]
    before = (tmp_path / "out.jsonl").read_bytes()
    assert cli(*argv)[0] == 0
    assert (tmp_path / "out.jsonl").read_bytes() == before


def test_an_interruption_keeps_what_is_done(cli, model_path, tmp_path, monkeypatch):
    (tmp_path / "in.jsonl").write_text('{"prompt": "hello"}\n' * 3)

    def interrupted(*args, **options):
        yield 0, 3
        yield 2, 3
        raise KeyboardInterrupt

    monkeypatch.setattr("rookery.engine.batch.run_batch", interrupted)
    code, out, err = cli("batch", tmp_path / "in.jsonl", "out.jsonl", "--model", model_path)
    assert (code, out) == (130, "")
    assert "2 of 3 texts are in out.jsonl; the same command goes on" in err


def test_beginnings_are_kept_for_the_next_run(cli, model_path, tmp_path):
    (tmp_path / "in.jsonl").write_text(
        '{"prompt": "hello hello hello hello 1"}\n{"prompt": "hello hello hello hello 2"}\n'
    )
    for name in ("one", "two"):
        argv = [tmp_path / "in.jsonl", tmp_path / name, "--model", model_path, "-n", 5, "--cache", tmp_path / "c"]
        assert cli("batch", *argv)[0] == 0
    assert len([*(tmp_path / "c").iterdir()]) >= 3
    lines = [sorted((tmp_path / name).read_text().splitlines()) for name in ("one", "two")]
    assert lines[0] == lines[1]
    sizes = [file.stat().st_size for file in (tmp_path / "c").iterdir()]
    argv = [tmp_path / "in.jsonl", tmp_path / "three", "--model", model_path, "-n", 5, "--cache", tmp_path / "half"]
    assert cli("batch", *argv, "--cache-dtype", "float16")[0] == 0
    assert sum(file.stat().st_size for file in (tmp_path / "half").iterdir()) < sum(sizes)
