"""Serve a model with Ray Serve, by replicas on one machine or many.

Each replica is a whole server, as `chatglm serve` starts it, with its own model and batch. Ray Serve spreads requests
over them, adds replicas while more than `--target` answers are under way in each, takes idle ones away, and replaces
dead ones and those with a model that fails. It runs on the cluster that RAY_ADDRESS names, else on this machine; every
machine needs this package installed and the model's folder at the same place. Ctrl-C or SIGTERM ends it.
"""

import argparse
import dataclasses
import logging
import os
import signal
import threading

from .arguments import positive
from .imports import imports
from .server import Settings, add_address_arguments, add_settings_arguments, settings_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_settings_arguments(parser)
    add_address_arguments(parser)
    parser.add_argument("--min-replicas", type=positive(int), default=1, help="that always run")
    parser.add_argument("--max-replicas", type=positive(int), default=4, help="that run under load")
    parser.add_argument("--target", type=positive(float), help="answers in a replica (default: --max-batch)")
    parser.add_argument("--cpus", type=float, default=1, help="for each replica")
    parser.add_argument("--gpus", type=float, default=0, help="for each replica; 0.5 lets two share one")


def run(arguments: argparse.Namespace) -> None:
    if arguments.min_replicas > arguments.max_replicas:
        raise ValueError(
            f"--min-replicas {arguments.min_replicas} is more than --max-replicas {arguments.max_replicas}."
        )
    settings = settings_of(arguments)
    device = settings.device or ("cuda" if arguments.gpus else "cpu")
    settings = dataclasses.replace(settings, model=os.path.abspath(settings.model), device=device)
    if not os.path.isdir(settings.model):
        raise FileNotFoundError(f"There is no folder {settings.model}: give a checkpoint folder with --model.")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when ray starts
    with imports("ray"):
        import ray
        from ray import serve
    scaling = (arguments.min_replicas, arguments.max_replicas, arguments.target)
    served = application(settings, *scaling, arguments.cpus, arguments.gpus)
    ray.init(logging_level=logging.WARNING)
    address = {"host": arguments.host, "port": arguments.port, "keep_alive_timeout_s": arguments.keep_alive}
    serve.start(http_options=address)
    serve.run(served, name="chatglm")
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):  # after ray.init, which sets handlers of its own
        signal.signal(number, lambda *_: ended.set())
    print(f"Serving on http://{arguments.host}:{arguments.port}", flush=True)
    while not ended.wait(1):  # Windows handles Ctrl-C between waits only
        pass
    serve.shutdown()


def application(
    settings: Settings,
    min_replicas: int = 1,
    max_replicas: int = 4,
    target: float | None = None,
    cpus: float = 1,
    gpus: float = 0,
):
    """The server as a Ray Serve application, for `serve.run`.

    Args:
        settings: of each replica.
        min_replicas, max_replicas: how many; as many as load asks for within that.
        target: answers under way in each replica that scaling aims at; a full batch by default.
        cpus, gpus: that Ray keeps for each replica.
    """

    with imports("ray"):
        from ray import serve

        from .server.app import create_app

    def build():
        return create_app(settings)

    @serve.deployment(
        name="ChatGLM",
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
        autoscaling_config={
            "min_replicas": min_replicas,
            "max_replicas": max_replicas,
            "initial_replicas": min_replicas,
            "target_ongoing_requests": target or settings.max_batch,
        },
        # One more than a replica queues: so the replica says that it is busy, in OpenAI's form.
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
