"""The status page: what the last minutes were like, model by model, in a browser and in plain words."""

from service.status_page.observer import Observer
from service.status_page.pages import status_pages
from service.status_page.thread import ObserverThread

__all__ = ["Observer", "ObserverThread", "status_pages"]
