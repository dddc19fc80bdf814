"""The webhook: an HTTP receiver is told of every image that is not normal, from a queue on disk."""

from patchcore_plugin.webhook.delivery import Webhook
from patchcore_plugin.webhook.events import Receiver, is_told, make_event
from patchcore_plugin.webhook.queue import EventQueue, QueueError

__all__ = ["EventQueue", "QueueError", "Receiver", "Webhook", "is_told", "make_event"]
