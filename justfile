# The verbs of CONTRIBUTING.md. `pip install rust-just` gives `just`; every line also works typed by hand.

default:
    @just --list

# rebuild the compiled modules and install the project in place
build:
    pip install -e .

# style of Python and of C++
lint:
    ruff check .
    ruff format --check .
    git ls-files -z 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' | xargs -0 -r clang-format --dry-run -Werror

# put the style right
format:
    ruff check --fix .
    ruff format .
    git ls-files -z 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' | xargs -0 -r clang-format -i

types:
    basedpyright

test *ARGS:
    pytest {{ARGS}}

# one row a case, beside torch; `just bench --help` for the choices
bench *ARGS:
    python bench/ops.py {{ARGS}}

# what CI runs, from a new environment
ci:
    bash .ci/run
