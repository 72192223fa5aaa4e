"""The log as JSON: one object in each line."""

import json
import logging
import time


class JsonFormatter(logging.Formatter):
    """Time, level, logger and message, and the fields of a request. Line breaks are escaped."""

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "time": f"{moment}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if isinstance(record.args, dict):
            line |= record.args
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str).encode("utf-8", "replace").decode()


def log_config() -> dict:
    """For uvicorn, whose own lines and this server's go to stderr; requests are logged by the gate."""
    handlers = ["json"]
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"json": {"()": JsonFormatter}},
        "handlers": {"json": {"class": "logging.StreamHandler", "formatter": "json"}},
        "loggers": {
            "uvicorn": {"handlers": handlers, "level": "INFO", "propagate": False},
            "uvicorn.access": {"handlers": [], "propagate": False},
            "chatglm": {"handlers": handlers, "level": "INFO", "propagate": False},
        },
    }
