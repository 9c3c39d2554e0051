# NSA_EXPORT_DIR/kernels.c and kernels.bin: found, or made by a Python that has Triton.
set(NSA_ARCHS "" CACHE STRING "Compute capabilities of the kernels, such as 80;90")
set(NSA_DIMS "" CACHE STRING "Head dims of the kernels, such as 64;192/128")
set(NSA_DTYPES "" CACHE STRING "Dtypes of the kernels: fp32;fp16;bf16")
set(NSA_PYTHON "" CACHE FILEPATH "A Python that has Triton")
set(NSA_PIP_ARGS "" CACHE STRING "More arguments for pip")
set(NSA_EXPORTED "" CACHE PATH "A folder that python -m nsa.aot wrote")

if(NOT NSA_EXPORTED AND NOT NSA_PYTHON AND EXISTS ${PROJECT_SOURCE_DIR}/native/exported/kernels.c)
  set(NSA_EXPORT_DIR ${PROJECT_SOURCE_DIR}/native/exported)
else()
  set(NSA_EXPORT_DIR ${NSA_EXPORTED})
endif()
if(NSA_EXPORT_DIR)
  get_filename_component(NSA_EXPORT_DIR ${NSA_EXPORT_DIR} ABSOLUTE BASE_DIR ${CMAKE_BINARY_DIR})
  foreach(name kernels.c kernels.bin)
    if(NOT EXISTS ${NSA_EXPORT_DIR}/${name})
      message(FATAL_ERROR "NSA_EXPORTED must be a folder that python -m nsa.aot wrote, but ${NSA_EXPORT_DIR} has no ${name}")
    endif()
  endforeach()
  message(STATUS "Kernels: ${NSA_EXPORT_DIR}")
  return()
endif()

set(NSA_EXPORT_DIR ${PROJECT_BINARY_DIR}/exported)
set(export_needs)
if(NSA_PYTHON)
  set(export_python ${NSA_PYTHON})
elseif(EXISTS ${PROJECT_SOURCE_DIR}/.venv/bin/python)
  set(export_python ${PROJECT_SOURCE_DIR}/.venv/bin/python)
else()
  find_package(Python3 3.10 COMPONENTS Interpreter)
  if(NOT Python3_FOUND)
    message(FATAL_ERROR "Python 3.10 or newer is needed to compile the kernels. Give one with -DNSA_PYTHON=, or exported kernels "
                        "with -DNSA_EXPORTED=")
  endif()
  set(venv ${PROJECT_BINARY_DIR}/python)
  set(export_python ${venv}/bin/python)
  separate_arguments(pip_args UNIX_COMMAND "${NSA_PIP_ARGS}")
  # The stamp is written last, so that an interrupted installation is begun anew.
  add_custom_command(
    OUTPUT ${venv}/installed
    COMMAND ${Python3_EXECUTABLE} -m venv --clear ${venv}
    COMMAND ${export_python} -m pip install --disable-pip-version-check --quiet ${pip_args}
            -c ${PROJECT_SOURCE_DIR}/constraints.txt triton
    COMMAND ${CMAKE_COMMAND} -E touch ${venv}/installed
    DEPENDS ${PROJECT_SOURCE_DIR}/constraints.txt
    COMMENT "Installing Triton into ${venv}"
    VERBATIM)
  set(export_needs ${venv}/installed)
endif()

set(export_arguments)
foreach(name archs dims dtypes)
  string(TOUPPER NSA_${name} variable)
  if(${variable})
    string(REPLACE ";" "," items "${${variable}}")
    list(APPEND export_arguments --${name} ${items})
  endif()
endforeach()
# A file that changes with the arguments, since no generator but Ninja looks at a command's text.
file(WRITE ${PROJECT_BINARY_DIR}/export.txt.now "${export_python} ${export_arguments}\n")
configure_file(${PROJECT_BINARY_DIR}/export.txt.now ${PROJECT_BINARY_DIR}/export.txt COPYONLY)
file(GLOB_RECURSE export_sources CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/src/nsa/aot/*.py
     ${PROJECT_SOURCE_DIR}/src/nsa/kernels/triton/*.py)
foreach(name __init__ config layout tuning decode_tuning)
  list(APPEND export_sources ${PROJECT_SOURCE_DIR}/src/nsa/${name}.py)
endforeach()
add_custom_command(
  OUTPUT ${NSA_EXPORT_DIR}/kernels.c ${NSA_EXPORT_DIR}/kernels.bin ${NSA_EXPORT_DIR}/kernels.json
  COMMAND ${CMAKE_COMMAND} -E env PYTHONPATH=${PROJECT_SOURCE_DIR}/src PYTHONDONTWRITEBYTECODE=1
          ${export_python} -m nsa.aot --output ${NSA_EXPORT_DIR} ${export_arguments}
  DEPENDS ${export_sources} ${export_needs} ${PROJECT_BINARY_DIR}/export.txt
  COMMENT "Compiling the kernels; some minutes the first time"
  VERBATIM)
message(STATUS "Kernels: compiled by ${export_python}")
