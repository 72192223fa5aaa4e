"""Serves a ChatGLM model with Ray Serve: the API of api_server.py, by replicas on one machine or many.

    python examples/ray_serve.py [--model FOLDER] [--min-replicas 1] [--max-replicas 4] [--gpus 1] [--port 8000]

Each replica is a whole server with its own model and batch. Ray Serve spreads requests over them, adds replicas while
more than `--target` answers are under way in each and takes idle ones away, and replaces those that die or whose model
fails. It runs on the cluster that RAY_ADDRESS names, else on this machine; the model's folder has to be at the same
place on every machine, with the package installed. Ctrl-C or SIGTERM ends it.
"""

import argparse
import dataclasses
import logging
import os
import signal
import sys
import threading
from pathlib import Path

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when ray starts

try:
    import api_server
    import cli_demo
    import ray
    from ray import serve
except ModuleNotFoundError as error:
    sys.exit(f'{error}. Install Ray first: pip install ".[ray]"   (in the folder above examples)')


def application(
    settings: api_server.Settings,
    min_replicas: int = 1,
    max_replicas: int = 4,
    target: float | None = None,
    cpus: float = 1,
    gpus: float = 0,
) -> serve.Application:
    """The server as a Ray Serve application, for `serve.run`.

    Args:
        settings: of each replica.
        min_replicas, max_replicas: how many; as many as load asks for within that.
        target: answers under way in each replica that scaling aims at; a full batch by default.
        cpus, gpus: that Ray keeps for each replica.
    """

    def build():
        return api_server.create_app(settings)

    @serve.deployment(
        name="ChatGLM",
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
        autoscaling_config={
            "min_replicas": min_replicas,
            "max_replicas": max_replicas,
            "initial_replicas": min_replicas,
            "target_ongoing_requests": target or settings.max_batch,
        },
        # One more than a replica queues: so that the one who says that it is busy is the replica, in OpenAI's form.
        max_ongoing_requests=settings.max_batch + settings.max_queue + 1,
        graceful_shutdown_timeout_s=settings.time_limit,
        health_check_period_s=5,
    )
    @serve.ingress(build)
    class Replica:
        def check_health(self) -> None:
            if not self.app.state.service.scheduler.healthy:
                raise RuntimeError("The model does not compute any more.")

    return Replica.bind()


def main() -> int:
    parser = argparse.ArgumentParser(description="Serves a ChatGLM model with Ray Serve.")
    api_server.add_arguments(parser)
    api_server.add_address_arguments(parser)
    parser.add_argument("--min-replicas", type=cli_demo.positive(int), default=1)
    parser.add_argument("--max-replicas", type=cli_demo.positive(int), default=4)
    parser.add_argument("--target", type=cli_demo.positive(float), help="answers in a replica (default: --max-batch)")
    parser.add_argument("--cpus", type=float, default=1, help="for each replica (default: 1)")
    parser.add_argument("--gpus", type=float, default=0, help="for each replica; 0.5 lets two share one (default: 0)")
    arguments = parser.parse_args()
    if arguments.min_replicas > arguments.max_replicas:
        parser.error(f"--min-replicas {arguments.min_replicas} is more than --max-replicas {arguments.max_replicas}.")
    settings = api_server.settings_of(arguments)
    device = settings.device or ("cuda" if arguments.gpus else "cpu")
    settings = dataclasses.replace(settings, model=os.path.abspath(settings.model), device=device)
    if not os.path.isdir(settings.model):
        parser.error(f"there is no folder {settings.model}: give a checkpoint folder with --model.")

    # The modules beside this file travel to the other machines.
    ray.init(runtime_env={"working_dir": str(Path(__file__).resolve().parent)}, logging_level=logging.WARNING)
    address = {"host": arguments.host, "port": arguments.port, "keep_alive_timeout_s": arguments.keep_alive}
    serve.start(http_options=address)
    scaling = (arguments.min_replicas, arguments.max_replicas, arguments.target)
    serve.run(application(settings, *scaling, arguments.cpus, arguments.gpus), name="chatglm")
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):  # after ray.init, which sets handlers of its own
        signal.signal(number, lambda *_: ended.set())
    print(f"Serving on http://{arguments.host}:{arguments.port}", flush=True)
    ended.wait()
    serve.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
