# CMake runs nvcc through this: what ptxas -v says about each kernel goes to OBJECT.ptxas, for
# kernel_report.py, and the rest of the output to where it always goes. In sh, because the path of
# a Python would be part of every compile command, and another environment would compile anew.
object=
previous=
for argument in "$@"; do
  [ "$previous" = -o ] && object=$argument
  previous=$argument
done
[ -n "$object" ] || exec "$@"

"$@" 2>"$object.stderr"
status=$?
verbose='^ptxas info    : \|^    [0-9]* bytes stack frame'
# A remark with a number, as in "ptxas info    : (C7510) ...", is for people to read.
sed -n "/$verbose/{/^ptxas info    : (/!p;}" "$object.stderr" >"$object.ptxas"
sed "/$verbose/{/^ptxas info    : (/!d;}" "$object.stderr" >&2
rm -f "$object.stderr"
exit $status
