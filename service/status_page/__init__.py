"""The status page: what the last minutes were like, model by model, in a browser and in plain words."""

from service.status_page.observer import Observer, ObserverThread
from service.status_page.pages import status_pages

__all__ = ["Observer", "ObserverThread", "status_pages"]
