"""Makes every layer and family known to Keras as soon as both packages are imported, in whichever order.

Keras finds a class of a saved model by its registered name, and has no entry point for packages: the class must be
imported first. `import keras_vits` cannot import them, since that imports Keras, whose backend the command line has yet
to choose, and takes seconds. So if Keras is there already, they are registered at once; otherwise right after whoever
imports it. A finder on `sys.meta_path` is what Python has for that. It finds nothing itself: it lets the loader that
the other finders chose run to its end, and goes away once it has registered.
"""

import importlib
import importlib.abc
import pkgutil
import sys

_PACKAGES = ("keras_vits.layers", "keras_vits.heads", "keras_vits.models")  # whose files may hold layers


def register() -> None:
    """Registers the layers and models of the package under `keras_vits>ClassName`."""
    import keras

    for package in map(importlib.import_module, _PACKAGES):
        for found in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            module = importlib.import_module(found.name)
            for name, value in vars(module).items():
                defined_here = isinstance(value, type) and value.__module__ == module.__name__
                if defined_here and issubclass(value, keras.Layer):
                    _register(keras, name, value)


def _register(keras, name, cls):
    known = keras.saving.get_registered_object(f"keras_vits>{name}")
    if known not in (None, cls):
        raise TypeError(
            f"Layers are saved by their class's name, which must be unique in keras_vits: {cls.__module__} and "
            f"{known.__module__} both define {name}. Rename one."
        )
    keras.saving.register_keras_serializable("keras_vits")(cls)


def register_with_keras() -> None:
    """Registers now if Keras is imported, otherwise when it has been."""
    if "keras" in sys.modules:
        register()
    else:
        sys.meta_path.insert(0, _AfterImport())


class _AfterImport(importlib.abc.MetaPathFinder):
    """Registers after the import of Keras, or of the module of ours that imports Keras and is not complete before."""

    def __init__(self):
        self.depth = 0  # of imports that are running, Keras' and our own

    def find_spec(self, name, path=None, target=None):
        if name != "keras" and not name.startswith("keras_vits."):
            return None
        others = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, others), None)
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = self._then_register(spec.loader.exec_module)
        return spec

    def _then_register(self, execute):
        def exec_module(module):
            self.depth += 1
            try:
                execute(module)
            finally:
                self.depth -= 1
            if not self.depth and "keras" in sys.modules and self in sys.meta_path:
                sys.meta_path.remove(self)
                register()

        return exec_module
