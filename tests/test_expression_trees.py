"""Expression trees: right, well-formed, disjoint between splits, and no path uses what it cannot know."""

import re
from collections.abc import Callable

import pytest
from multiverse import TAGS, Block, BranchLayout
from multiverse.trainer.expression_trees import FAMILIES, Expression, ExpressionProblem, TreeOptions
from multiverse.trainer.synthetic import Problem, Sum, generate_problems, read_answer, train_and_test
from tiny import tiny_tokenizer

PROBLEMS = generate_problems(60, 3, TreeOptions(branching=(2, 3)))
NAME = re.compile(r"[A-Z]\d*")

TOKENIZER = tiny_tokenizer()
TOKENIZER.add_tokens(list(TAGS))


def layout_of(text: str) -> tuple[list[int], BranchLayout]:
    token_ids = {tag: TOKENIZER.convert_tokens_to_ids(tag) for tag in TAGS}
    ids = TOKENIZER.encode(text)
    return ids, BranchLayout.from_token_ids(ids, token_ids)


def definitions_of(question: str) -> dict[str, str]:
    """Name and expression of every line of a question but the first."""
    return dict(line.split(" = ") for line in question.splitlines()[1:])


def values_of(question: str) -> Callable[[str], int]:
    """Evaluates any expression of numbers and of the names that a question defines, as Python would."""
    definitions = definitions_of(question)

    def value(expression: str) -> int:
        return eval(NAME.sub(lambda name: f"({value(definitions[name[0]])})", expression))

    return value


def depth_of(blocks: list[Block]) -> int:
    return 1 + max(depth_of(path.blocks) for block in blocks for path in block.paths) if blocks else 0


def all_blocks(blocks: list[Block]) -> list[Block]:
    return [each for block in blocks for each in (block, *(b for p in block.paths for b in all_blocks(p.blocks)))]


def test_every_written_equation_is_true() -> None:
    steps = 0
    for problem in PROBLEMS:
        value = values_of(problem.question)
        for line in problem.parallel().splitlines():
            if "=" in line:
                sides = line.split("=")
                assert len({value(side) for side in sides}) == 1, line
                assert sides[-1].isdecimal(), "every line comes to a number"
                assert len(re.findall(r"\d[+*-]\d", line)) <= 1, "one operation a line"
                steps += 1
    assert steps > 1000


def test_answers_follow_from_the_question_alone() -> None:
    for problem in PROBLEMS:
        wanted = problem.question.splitlines()[0].removeprefix("Find ").removesuffix(".")
        assert values_of(problem.question)(wanted) == problem.answer
        assert read_answer(problem.parallel()) == read_answer(problem.sequential()) == problem.answer


def chain_lines(name: str, chain: str) -> list[str]:
    """The lines that work out `12-3+7`, one operation each."""
    first, *steps = re.findall(r"[+-]?\d+", chain)
    lines, total = [], first
    for step in steps:
        lines.append(f"{total}{step}={eval(total + step)}")
        total = lines[-1].split("=")[1]
    return [*lines, f"{name}={total}"]


def test_forms_hold_the_same_lines_and_chains_are_those_of_the_question() -> None:
    for problem in PROBLEMS:
        content = re.sub(r"<Goal>.*?</Goal>", "", problem.parallel(), flags=re.DOTALL)
        lines = [re.sub(r"^[\d.]+: ", "", line) for line in content.splitlines() if line and line not in TAGS]
        assert lines == problem.sequential().splitlines()
        chains = re.findall(r"^([A-Z]\d*) = (\d[\d+-]*)$", problem.question, flags=re.MULTILINE)
        assert chains
        for name, chain in chains:
            place = lines.index(name) + 1
            wanted = chain_lines(name, chain)
            assert lines[place : place + len(wanted)] == wanted


def test_parallel_forms_are_well_formed_and_nest_one_block_per_inner_node() -> None:
    depths = set()
    for problem in PROBLEMS:
        _, layout = layout_of(problem.parallel())
        assert layout.problems == []
        names = [len(NAME.findall(line)) for line in problem.question.replace("Find ", "_ = ").splitlines()]
        # In the question the definition of an expression names itself and its parts, in the order of the blocks.
        parts = [names[0], *(count - 1 for count in names[1:] if count > 1)]
        assert [len(block.paths) for block in all_blocks(layout.blocks)] == parts
        depth = max(len(name) for name in NAME.findall(problem.question))
        assert depth_of(layout.blocks) == depth
        depths.add(depth)
    assert depths == {1, 2, 3}


def visible_lines(pieces: list[str], layout: BranchLayout, branch: int) -> list[tuple[str, bool]]:
    """Lines that the last token of a branch sees, each with whether the branch wrote it."""
    branches = layout.branch_ids.tolist()
    last = len(branches) - 1 - branches[::-1].index(branch)
    lines = [("", False)]
    for index in layout.attention_mask(last)[0].nonzero().flatten().tolist():
        line, is_own = lines[-1]
        if pieces[index] == "\n":
            lines.append(("", False))
        else:
            lines[-1] = (line + pieces[index], is_own if line else branches[index] == branch)
    return lines


def lines_beyond_reach(question: str, text: str) -> list[str]:
    """Lines that use what their branch cannot know.

    A path may write names of its own node and of those below it, and use the numbers of its own definition, results
    that it sees, and by their names those that it sees named.
    """
    ids, layout = layout_of(text)
    pieces = [TOKENIZER.decode([token_id]) for token_id in ids]
    definitions = definitions_of(question)
    found = []

    def check(branch: int, node: str) -> None:
        numbers = set(re.findall(r"\d+", NAME.sub("", definitions.get(node, ""))))
        named: set[str] = set()
        for line, is_own in visible_lines(pieces, layout, branch):
            content = re.sub(r"^([\d.]+|Answer): ", "", line)
            sides = content.split("=")
            names, is_naming = set(NAME.findall(content)), len(sides) == 2 and bool(NAME.fullmatch(sides[0]))
            if is_own and content not in TAGS:
                used = set(re.findall(r"\d+", NAME.sub("", sides[-1] if is_naming else sides[max(len(sides) - 2, 0)])))
                unnamed = names - named if len(sides) > 1 and not is_naming else set()
                if not (used <= numbers) or unnamed or not all(name.startswith(node) for name in names):
                    found.append(line)
            if len(sides) > 1:
                numbers.add(sides[-1])
            if is_naming:
                named.add(sides[0])

    def walk(branch: int, node: str, blocks: list[Block]) -> None:
        check(branch, node)
        for block in blocks:
            for number, path in enumerate(block.paths, start=1):
                walk(path.branch, f"{node}{number}" if node else chr(ord("A") + number - 1), path.blocks)

    walk(0, "", layout.blocks)
    return found


def test_paths_use_the_question_their_ancestors_and_themselves_alone() -> None:
    for problem in PROBLEMS:
        assert lines_beyond_reach(problem.question, problem.parallel()) == []


@pytest.mark.parametrize("line", ["A+1=5+1=6", "B1+B2=1+2=3", "97-1=96", "B=98", "A"])
def test_that_check_finds_what_a_path_cannot_know(line: str) -> None:
    (problem,) = generate_problems(1, 0, TreeOptions(depth=(2, 2)))
    text = problem.parallel().replace("\n2: B\n<Parallel>", f"\n2: B\n{line}\n<Parallel>")
    assert lines_beyond_reach(problem.question, text) == [line]


def test_splits_share_no_question_and_repeat_for_the_same_seed() -> None:
    small = TreeOptions(depth=(1, 1), terms=(2, 2))
    train, held_out = train_and_test(3000, 1000, 5, small, small)
    questions = [problem.question for problem in (*train, *held_out)]
    assert len(set(questions)) == 4000
    assert train_and_test(3000, 1000, 5, small, small) == (train, held_out)
    assert train_and_test(0, 1000, 5, None, small)[1] == held_out
    assert generate_problems(3000, 5, small) != train, "there was something to leave out"
    assert generate_problems(10, 6, small) != generate_problems(10, 5, small)


def test_options_are_kept() -> None:
    options = TreeOptions(depth=(2, 3), branching=(2, 4), terms=(3, 5), largest=25, products=0.5)
    signs: set[str] = set()
    for problem in generate_problems(40, 0, options):
        definitions = definitions_of(problem.question)
        chains = {name: text for name, text in definitions.items() if not NAME.search(text)}
        assert len({len(name) for name in chains}) == 1
        assert {len(name) for name in chains} <= {2, 3}
        wanted = problem.question.splitlines()[0].removeprefix("Find ").removesuffix(".")
        inner = [wanted, *(text for name, text in definitions.items() if name not in chains)]
        assert all(2 <= len(NAME.findall(text)) <= 4 for text in inner)
        for text in chains.values():
            assert 3 <= len(re.findall(r"\d+", text)) <= 5
        results = re.findall(r"=(-?\d+)$", problem.parallel(), flags=re.MULTILINE)
        assert all(1 <= int(result) <= 25 for result in results)
        kinds = [frozenset(re.sub(r"[A-Z]\d*", "", text)) for text in inner]
        assert all(kind == {"*"} or kind <= {"+", "-"} for kind in kinds)
        signs |= frozenset().union(*kinds)
    assert signs == {"+", "-", "*"}
    for products, star in ((0.0, False), (1.0, True)):
        problems = generate_problems(20, 0, TreeOptions(products=products))
        assert any("*" in problem.question for problem in problems) is star


def test_both_families_are_drawn_by_name() -> None:
    assert set(FAMILIES) == {"sums", "trees"}
    for options in FAMILIES.values():
        problems, held_out = train_and_test(5, 3, 0, options(), options())
        for problem in (*problems, *held_out):
            assert isinstance(problem, Problem)
            assert problem.messages("parallel")["completion"][0]["content"] == problem.parallel()


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"depth": (0, 2)}, "depth"),
        ({"depth": (3, 2)}, "depth"),
        ({"depth": (1, 9)}, "depth"),
        ({"branching": (1, 2)}, "branching"),
        ({"branching": (2, 10)}, "branching"),
        ({"products": 1.5}, "products"),
        ({"terms": (1, 2)}, "terms"),
        ({"largest": 19}, "largest"),
    ],
)
def test_bad_options_are_named(options: dict, name: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}`"):
        TreeOptions(**options)


@pytest.mark.parametrize("operators", [(), ("+", "-"), ("/",)])
def test_operators_must_fit_the_parts(operators: tuple[str, ...]) -> None:
    parts = (Sum("A", (1, 2)), Sum("B", (3, -1)))
    with pytest.raises(ValueError, match="`operators`"):
        ExpressionProblem(parts, operators)
    with pytest.raises(ValueError, match="`operators`"):
        Expression("A", parts=parts, operators=operators)
