"""The engine's main program: vLLM's own API server, on a port that it may share for a moment.

`supervisor` answers on that port while no engine is there, and until this one does. So the port is bound with
``SO_REUSEPORT``, which vLLM's own `main` leaves out where there is one API server. All else is as there. A port
can be shared by processes of one user only.
"""

from __future__ import annotations

import signal


def main() -> None:
    """``python -c "from adapterhub.serving.engine.entry import main; main()" VLLM FLAGS…``"""
    import uvloop
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.logger import configure_logging_from_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_env_setup()
    args = make_arg_parser(FlexibleArgumentParser(description="AdapterHub's engine")).parse_args()
    configure_logging_from_args(args)
    validate_parsed_serve_args(args)
    uvloop.run(_serve(args))


async def _serve(args: object) -> None:
    from vllm.entrypoints.launchers.api_server.entry import run_server_worker
    from vllm.entrypoints.launchers.launcher import setup_server
    from vllm.utils.system_utils import decorate_logs

    decorate_logs("APIServer", skip_if_decorated=True)
    signal.signal(signal.SIGTERM, _interrupt)  # until the HTTP server has its own
    address, sock = setup_server(args, reuse_port=True)
    await run_server_worker(address, sock, args)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt
