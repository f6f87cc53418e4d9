#include "cpu/tensors.h"

#include <math.h>
#include <stdio.h>

#include <exception>
#include <new>

#include "cpu/arrays.h"
#include "cpu/dlpack.h"
#include "cpu/ops.h"

namespace feather {
namespace {

using dlpack::DLTensor;

// What use_torch was given; kept for the life of the process.
struct {
  PyTypeObject* tensor;
  PyTypeObject* parameter;
  PyObject* get_num_threads;
  int (*describe)(void* tensor, DLTensor* out);
} torch_side{};

const dlpack::DLPackExchangeAPI* find_version(const void* pointer) {
  auto header = static_cast<const dlpack::DLPackExchangeAPIHeader*>(pointer);
  while (header != nullptr && header->major != dlpack::kMajorVersion) header = header->prev_api;
  return reinterpret_cast<const dlpack::DLPackExchangeAPI*>(header);
}

// A tensor as an operand: on the CPU, of a weight's dtype, without gaps or repetitions. Others cannot be taken.
struct Operand {
  DLTensor tensor;
  DType dtype;
  int64_t n;

  bool take(PyObject* object) {
    if (Py_TYPE(object) != torch_side.tensor && Py_TYPE(object) != torch_side.parameter) return false;
    if (torch_side.describe(object, &tensor) != 0) {
      PyErr_Clear();
      return false;
    }
    const bool usable = tensor.device.device_type == dlpack::kDLCPU && take_dtype() && take_layout();
    return usable && (tensor.data != nullptr || n == 0);
  }

  bool take_dtype() {
    const auto [code, bits, lanes] = tensor.dtype;
    if (lanes != 1 || (code != dlpack::kDLFloat && code != dlpack::kDLBfloat)) return false;
    if (code == dlpack::kDLBfloat) {
      dtype = DType::kBFloat16;
      return bits == 16;
    }
    dtype = bits == 16 ? DType::kFloat16 : bits == 32 ? DType::kFloat32 : DType::kFloat64;
    return bits == 16 || bits == 32 || bits == 64;
  }

  // In whatever order: there is a dimension of stride 1, one whose stride is the size of that, and so on.
  bool take_layout() {
    n = 1;
    int dimensions = 0;
    for (int d = 0; d < tensor.ndim; ++d) {
      n *= tensor.shape[d];
      dimensions += tensor.shape[d] != 1;
    }
    if (n == 0) return true;
    for (int64_t stride = 1; dimensions > 0; --dimensions) {
      int d = 0;
      while (d < tensor.ndim && (tensor.shape[d] == 1 || tensor.strides[d] != stride)) ++d;
      if (d == tensor.ndim) return false;
      stride *= tensor.shape[d];
    }
    return true;
  }

  bool is_laid_out_as(const Operand& other) const {
    if (tensor.ndim != other.tensor.ndim) return false;
    for (int d = 0; d < tensor.ndim; ++d) {
      const int64_t size = tensor.shape[d];
      if (size != other.tensor.shape[d]) return false;
      if (size != 1 && n > 0 && tensor.strides[d] != other.tensor.strides[d]) return false;
    }
    return true;
  }

  bool is_scalar_for(const Operand& weight) const {
    return tensor.ndim == 0 && dtype == (is_wide(weight.dtype) ? DType::kFloat64 : DType::kFloat32);
  }

  void* data() const { return static_cast<char*>(tensor.data) + tensor.byte_offset; }
  Array array() const { return Array{data(), n, dtype}; }
};

// Sets the number of threads for n elements; false with a Python exception set.
bool find_threads(int64_t n, int* threads) {
  *threads = 1;
  if (n < kParallel) return true;
  PyObject* number = PyObject_CallNoArgs(torch_side.get_num_threads);
  if (number == nullptr) return false;
  *threads = static_cast<int>(PyLong_AsLong(number));
  Py_DECREF(number);
  return PyErr_Occurred() == nullptr;
}

// Runs op(threads) and returns Python's True; Python's other threads run meanwhile where that pays.
template <class F>
PyObject* run(int64_t n, const F& op) {
  int threads;
  if (!find_threads(n, &threads)) return nullptr;
  PyThreadState* released = n < kParallel ? nullptr : PyEval_SaveThread();
  PyObject* error = nullptr;
  char words[200] = "";
  try {
    op(threads);
  } catch (const std::bad_alloc&) {
    error = PyExc_MemoryError;
  } catch (const std::exception& exception) {
    error = PyExc_RuntimeError;
    snprintf(words, sizeof(words), "%s", exception.what());
  }
  if (released != nullptr) PyEval_RestoreThread(released);
  if (error != nullptr) return PyErr_Format(error, "%s", words);
  Py_RETURN_TRUE;
}

// The power, or NaN for what is no number.
double power_of(PyObject* object) {
  if (!PyFloat_CheckExact(object) && !PyLong_CheckExact(object)) return NAN;
  const double power = PyFloat_AsDouble(object);
  if (power == -1 && PyErr_Occurred()) PyErr_Clear();
  return power;
}

PyObject* try_threshold(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 4) return PyErr_Format(PyExc_TypeError, "try_threshold takes (w, t, p, out), got %zd arguments", count);
  Operand w, t, out;
  const double p = power_of(arguments[2]);
  const bool plain = p >= 1 && w.take(arguments[0]) && t.take(arguments[1]) && out.take(arguments[3]) &&
                     t.is_scalar_for(w) && out.is_laid_out_as(w);
  if (!plain) Py_RETURN_FALSE;
  const double value = read_scalar(t.data(), w.dtype);
  return run(w.n, [&](int threads) { threshold(w.array(), value, p, out.data(), out.dtype, threads); });
}

PyObject* try_scale_pruned_grad(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 5) {
    return PyErr_Format(PyExc_TypeError, "try_scale_pruned_grad takes (g, w, t, grad_scale, out), got %zd arguments",
                        count);
  }
  Operand g, w, t, grad_scale, out;
  const bool plain = g.take(arguments[0]) && w.take(arguments[1]) && t.take(arguments[2]) &&
                     grad_scale.take(arguments[3]) && out.take(arguments[4]) && t.is_scalar_for(w) &&
                     grad_scale.is_scalar_for(w) && g.is_laid_out_as(w) && out.is_laid_out_as(w);
  if (!plain) Py_RETURN_FALSE;
  const double value = read_scalar(t.data(), w.dtype), scale = read_scalar(grad_scale.data(), w.dtype);
  return run(w.n, [&](int threads) {
    scale_pruned_grad(g.array(), w.array(), value, scale, out.data(), out.dtype, threads);
  });
}

template <class F>
PyMethodDef fast_function(const char* name, F function) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), METH_FASTCALL, nullptr};
}

}  // namespace

bool use_torch(const pybind11::type& tensor, const pybind11::type& parameter, const pybind11::object& get_num_threads) {
  const pybind11::object capsule = pybind11::getattr(tensor, "__dlpack_c_exchange_api__", pybind11::none());
  if (!PyCapsule_IsValid(capsule.ptr(), dlpack::kCapsule)) return false;
  const auto* api = find_version(PyCapsule_GetPointer(capsule.ptr(), dlpack::kCapsule));
  if (api == nullptr || api->dltensor_from_py_object_no_sync == nullptr) return false;
  for (const pybind11::object& kept : {pybind11::object(tensor), pybind11::object(parameter), get_num_threads}) {
    kept.inc_ref();
  }
  torch_side = {reinterpret_cast<PyTypeObject*>(tensor.ptr()), reinterpret_cast<PyTypeObject*>(parameter.ptr()),
                get_num_threads.ptr(), api->dltensor_from_py_object_no_sync};
  return true;
}

PyMethodDef tensor_functions[] = {fast_function("try_threshold", try_threshold),
                                  fast_function("try_scale_pruned_grad", try_scale_pruned_grad),
                                  {nullptr, nullptr, 0, nullptr}};

}  // namespace feather
