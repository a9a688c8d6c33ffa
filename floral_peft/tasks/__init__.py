"""Tasks: data, its partition over clients, a model and settings, under one name."""

# isort: off
# In the order in which the tasks are listed.
from floral_peft.tasks import digits, synthetic, mnist, cifar10, cifar100, shakespeare
from floral_peft.tasks.task import Task, as_task, get_task, register_task, task_names
# isort: on


__all__ = [
    "Task",
    "as_task",
    "cifar10",
    "cifar100",
    "digits",
    "get_task",
    "mnist",
    "register_task",
    "shakespeare",
    "synthetic",
    "task_names",
]
